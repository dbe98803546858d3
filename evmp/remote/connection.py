"""Connections that reach only whom they may, and no longer than they may.

The address is checked when the connection is made, not when the name is looked at: whatever a name
resolves to at that moment, and wherever a redirect has led, no private machine is reached by it.

A read timeout bounds the silence between two packets, so a server that sends a byte now and then
could hold a thread for ever. So the socket that each thread uses is known here, and whoever calls
`cut_overdue` breaks those off whose deadline is over; `keeping` does, for who has nobody else.
"""

from __future__ import annotations

import http.client
import ipaddress
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final, cast

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util.ssl_ import create_urllib3_context

from evmp.errors import DownloadError
from evmp.remote.retry import Again, Deadline

CUT_SECONDS: Final = 0.1  # between two looks at what is overdue
MAX_HOSTS: Final = 256  # whose idle connections are kept
# An IPv4 address stands in their last bits: of NAT64, of old and of translated addresses.
_WRAPPED: Final = tuple(
    map(ipaddress.ip_network, ("64:ff9b::/96", "::/96", "::ffff:0:0:0/96")),
)
_LOCAL_NAT64: Final = ipaddress.ip_network("64:ff9b:1::/48")  # within a network, RFC 8215

Until = Callable[[Deadline], AbstractContextManager[None]]
"""Lets what a thread does within end with a deadline."""


class Guard:
    """Makes the connections of one process, and knows which thread uses which.

    Args:
        allow_private: whether any address may be reached, or only those of the public internet.
        connect_seconds: for each address of a host.
        known: a host and its port that may be reached, whatever the address.
    """

    def __init__(
        self, *, allow_private: bool, connect_seconds: float, known: tuple[str, int] = ("", 0)
    ) -> None:
        self._allow_private, self._connect_seconds = allow_private, connect_seconds
        self._known = known
        self._deadlines: dict[int, Deadline] = {}
        self._sockets: dict[int, socket.socket] = {}

    @contextmanager
    def until(self, deadline: Deadline) -> Iterator[None]:
        """Let the connections that this thread uses within end with the deadline; may be nested."""
        thread = threading.get_ident()
        outer = self._deadlines.get(thread)
        self._deadlines[thread] = deadline
        try:
            yield
        finally:
            self._sockets.pop(thread, None)
            if outer is None:
                del self._deadlines[thread]
            else:
                self._deadlines[thread] = outer

    @contextmanager
    def keeping(self, deadline: Deadline) -> Iterator[None]:
        """Do as `until`, and cut off what is overdue meanwhile; no thread stays behind."""
        is_over = threading.Event()

        def cut() -> None:
            while not is_over.wait(max(deadline.left, CUT_SECONDS)):
                self.cut_overdue()

        thread = threading.Thread(target=cut, daemon=True)
        thread.start()
        try:
            with self.until(deadline):
                yield
        finally:
            is_over.set()
            thread.join()

    @property
    def deadline(self) -> Deadline:
        """That of this thread, within `until`."""
        return self._deadlines[threading.get_ident()]

    def watch(self, sock: socket.socket) -> None:
        """Note that this thread uses a connection."""
        self._sockets[threading.get_ident()] = sock

    def cut_overdue(self) -> None:
        """Break off what is used beyond its deadline; for another thread than its user's."""
        for thread, sock in list(self._sockets.items()):
            deadline = self._deadlines.get(thread)
            if deadline and deadline.left <= 0:
                with suppress(OSError):  # of a TLS socket, too: its own method is not for others
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def connect(self, host: str, port: int) -> socket.socket:
        """Return a new connection.

        Raises:
            DownloadError: when the host does not exist or may not be reached.
            Again: when it cannot be reached now.
        """
        refused, failure = "", "no address"
        allow_private = self._allow_private or (host.strip("[]"), port) == self._known
        for family, kind, protocol, _, address in _resolve(host, port):
            if not (allow_private or is_public(str(address[0]))):
                refused = str(address[0])
                continue
            try:
                return self._connect(socket.socket(family, kind, protocol), address)
            except TimeoutError:
                failure = f"no connection within {self._connect_seconds:g} seconds"
            except OSError as error:
                failure = (error.strerror or str(error)).lower()
        if refused:
            raise DownloadError(
                f"{host} is {refused}, an address that is not public; "
                "allow_private_hosts: true reaches it"
            )
        raise Again(f"{host}: {failure}")

    def _connect(self, sock: socket.socket, address: Any) -> socket.socket:
        deadline = self.deadline
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(deadline.cap(self._connect_seconds))
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        self.watch(sock)
        return sock


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet, whatever it is wrapped in."""
    ip: Any = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if any(ip in network for network in _WRAPPED):
            inner = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
        if ip in _LOCAL_NAT64 or ip.is_site_local:
            return False
        if inner:
            return is_public(str(inner))
    return bool(ip.is_global and not ip.is_multicast)


def _resolve(host: str, port: int) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise Again(f"{host} cannot be looked up now") from None
        raise DownloadError(f"there is no host {host}") from None
    except UnicodeError:
        raise DownloadError(f"{host} is no name of a host") from None


class Pools(urllib3.PoolManager):
    """Keep-alive connections to any host, made and watched by a guard.

    Args:
        guard: makes the connections.
        n_connections: that are kept for a host.
    """

    def __init__(self, guard: Guard, n_connections: int) -> None:
        logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # its warnings name whole URLs
        context = create_urllib3_context()  # one for all: to load the certificates takes long
        context.load_default_certs()
        super().__init__(
            num_pools=MAX_HOSTS, maxsize=n_connections, retries=False, ssl_context=context
        )
        self._classes = {
            "http": _guarded(HTTPConnection, guard),
            "https": _guarded(HTTPSConnection, guard),
        }

    def _new_pool(self, scheme: str, *arguments: Any, **options: Any) -> Any:
        pool = super()._new_pool(scheme, *arguments, **options)
        pool.ConnectionCls = self._classes[scheme]
        return pool


class _Response(http.client.HTTPResponse):
    """An answer whose head is whole: http.client takes what came before an end for all of it."""

    def begin(self) -> None:
        """Read the head."""
        whole, self.fp = self.fp, cast(Any, _Lines(self.fp))
        try:
            super().begin()
        finally:
            if self.fp is not None:
                self.fp = whole


class _Lines:
    """A file whose lines end, or it has broken off."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readline(self, limit: int) -> bytes:
        """Return the next line, no more than `limit` bytes of it."""
        line: bytes = self._file.readline(limit)
        if not line.endswith(b"\n") and len(line) < limit:
            raise http.client.RemoteDisconnected("the head ends in its midst")
        return line

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _guarded(kind: Any, guard: Guard) -> Any:
    """Return a class of connections like `kind` that asks the guard."""

    class Connection(kind):  # type: ignore[misc]
        response_class = _Response

        def _new_conn(self) -> socket.socket:
            return guard.connect(self._dns_host, self.port)

        def request(self, *arguments: Any, **options: Any) -> None:
            if self.sock is not None:  # an old connection
                guard.watch(self.sock)
            super().request(*arguments, **options)

    return Connection
