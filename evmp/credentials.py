"""Who asks the cloud: one provider of credentials, the same for oss2 and for pyodps.

They come from the environment; where it has none, from the profile files, the role of the machine
or wherever else Alibaba Cloud's own library finds them. With `arn` they are those that STS lends to
whoever assumes that role, and new ones before an hour is over. Every process has a provider of its
own, made after the fork.

Nothing of them is kept anywhere, nor told: what the library says of a failure, which may quote a
request, is put into words of our own, and its loggers are silent.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from evmp.errors import CredentialsError

if TYPE_CHECKING:
    from evmp.job import Job

ROLE_SECONDS: Final = 3600  # of less the library would ask anew for each request
SESSION_NAME: Final = "evmp"
NO_LIBRARY: Final = (
    "credentials that are not in the environment, those of arn among them, need "
    "alibabacloud-credentials: pip install evmp[oss]"
)
_STATUS: Final = re.compile(r"http_code: (\d+)")
_CODE: Final = re.compile(r'"Code"\s*:\s*"([\w.]+)"')


class Variables(NamedTuple):
    """Names of the environment's variables for one kind of client."""

    key_id: str
    key_secret: str
    token: str


OSS: Final = Variables("OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET", "OSS_SESSION_TOKEN")
ALIBABA_CLOUD: Final = Variables(
    "ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET", "ALIBABA_CLOUD_SECURITY_TOKEN"
)


class CredentialsUnavailable(Exception):
    """Whoever lends credentials cannot do it now; asking again may help."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A key, and the token of the session that it is of, if any; read as oss2 and pyodps do."""

    key_id: str
    key_secret: str = field(repr=False)
    token: str = field(default="", repr=False)
    expires: float = float("inf")
    """In seconds since 1970."""

    def get_access_key_id(self) -> str:
        """Return the id of the key."""
        return self.key_id

    def get_access_key_secret(self) -> str:
        """Return its secret."""
        return self.key_secret

    def get_security_token(self) -> str | None:
        """Return the session's token; None without one."""
        return self.token or None

    def get_provider_name(self) -> str:
        """Return a name that the library puts into its own."""
        return SESSION_NAME


class Provider(Protocol):
    """What oss2 and pyodps ask before each request, from any number of threads."""

    def get_credentials(self) -> Credentials:
        """Return those that hold now.

        Raises:
            CredentialsError: when there are none, or the role is refused.
            CredentialsUnavailable: when whoever lends them does not answer.
        """


def open_provider(job: Job, *variables: Variables) -> Provider:
    """Return who asks for a job; nobody is asked yet.

    Args:
        variables: the environment's, those first that count most.
    """
    plain: Provider = _Environment(variables)
    if not job.arn:
        return plain
    return _Lent(lambda: _role(job, plain))


class _Environment:
    """The keys of the environment, or else what the library finds."""

    def __init__(self, variables: Sequence[Variables]) -> None:
        self._variables = variables
        self._elsewhere = _Lent(_chain)

    def get_credentials(self) -> Credentials:
        """Look anew, since it costs nothing; see Provider."""
        for names in self._variables:
            key_id, secret, token = (os.environ.get(name, "") for name in names)
            if key_id and secret:
                return Credentials(key_id, secret, token)
            if key_id or secret:  # not to go on as somebody else
                told, missing = sorted(names[:2], key=lambda it: not os.environ.get(it))
                raise CredentialsError(f"{told} is set, and {missing} is not; set both or neither")
        try:
            return self._elsewhere.get_credentials()
        except _Missing:
            first = self._variables[0]
            raise CredentialsError(
                f"no credentials; set {first.key_id} and {first.key_secret}, or give a profile "
                "file or a role of the machine"
            ) from None


class _Missing(Exception):
    """No place has any."""


class _Lent:
    """Credentials of a provider of the library, which renews them a quarter before they expire.

    While it cannot, the last ones serve as long as they hold.

    Args:
        opener: imports the library and makes the provider, when it is first asked.
    """

    def __init__(self, opener: Callable[[], Any]) -> None:
        self._opener, self._lock = opener, Lock()
        self._provider: Any = None
        self._last = Credentials("", "", expires=0)

    def get_credentials(self) -> Credentials:
        """Ask the library; see Provider."""
        try:
            with self._lock:
                self._provider = self._provider or _quietly(self._opener)
            lent = self._provider.get_credentials()
        except Exception as error:
            if time.time() < self._last.expires:
                return self._last
            if isinstance(error, (CredentialsError, _Missing)):
                raise
            raise _meaning_of(error) from None
        token = lent.get_security_token() or ""
        expires = lent.get_expiration() or (0.0 if token else float("inf"))
        key_id, secret = lent.get_access_key_id(), lent.get_access_key_secret()
        self._last = Credentials(key_id, secret, token, expires)
        return self._last


def _quietly(opener: Callable[[], Any]) -> Any:
    try:
        provider = opener()
    except ImportError:
        raise CredentialsError(NO_LIBRARY) from None
    for name in ("credentials", "alibabacloud-tea"):  # the import has let them speak
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from Tea.core import TeaCore

    # It keeps connections for the whole process, and may have some of the one we were forked from.
    TeaCore._sessions.clear()
    return provider


class _Chain:
    """The first of several providers that has credentials."""

    def __init__(self, providers: Sequence[Any]) -> None:
        self._providers = providers

    def get_credentials(self) -> Any:
        for provider in self._providers:
            try:
                lent = provider.get_credentials()
            except Exception as error:
                if _STATUS.search(str(error)):  # it was asked, and has refused
                    raise
                continue
            self._providers = [provider]
            return lent
        raise _Missing


def _chain() -> Any:
    """Return the library's places, in its order, but without its thread in the background."""
    from alibabacloud_credentials import provider
    from alibabacloud_credentials.utils import auth_util

    found = [provider.CLIProfileCredentialsProvider(), provider.ProfileCredentialsProvider()]
    if auth_util.enable_oidc_credential:
        found.insert(0, provider.OIDCRoleArnCredentialsProvider())
    if auth_util.environment_ecs_metadata_disabled.lower() != "true":
        found.append(provider.EcsRamRoleCredentialsProvider(async_update_enabled=False))
    if auth_util.environment_credentials_uri:
        found.append(provider.URLCredentialsProvider())
    return _Chain(found)


def _role(job: Job, plain: Provider) -> Any:
    from alibabacloud_credentials.provider import RamRoleArnCredentialsProvider

    return RamRoleArnCredentialsProvider(
        credentials_provider=plain,
        role_arn=job.arn,
        role_session_name=SESSION_NAME,
        duration_seconds=ROLE_SECONDS,
        sts_endpoint=job.sts_endpoint or None,
    )


def _meaning_of(error: Exception) -> Exception:
    """Return what to raise for what the library has raised: its words may hold a whole request."""
    status, code = _STATUS.search(str(error)), _CODE.search(str(error))
    if status and int(status[1]) < 500 and int(status[1]) != 429:
        reason = f"{status[1]} {code[1]}" if code else status[1]
        return CredentialsError(f"the role is refused by STS: {reason}; correct arn, or its rights")
    if status:
        return CredentialsUnavailable(f"STS answers with status {status[1]}")
    return CredentialsUnavailable(f"no credentials can be had now ({type(error).__name__})")
