"""Follow redirects from an address of the internet, which is this machine's own, to private ones.

For a network namespace that is the process's own. Prints what becomes of each.
"""

from __future__ import annotations

import subprocess

from httpserver import Answer, serving
from test_remote_http import job_of

from evmp.errors import DownloadError
from evmp.remote.http import HttpRemote

PUBLIC = "8.8.8.8"
PRIVATE = ["127.0.0.1", "169.254.169.254", "localhost", "[::ffff:127.0.0.1]"]


def main() -> None:
    """Follow them."""
    for command in ("link set lo up", f"addr add {PUBLIC}/32 dev lo"):
        subprocess.run(["ip", *command.split()], check=True)
    with serving(address=PUBLIC) as public, serving() as private:
        client = HttpRemote(job_of(allow_private_hosts=False))
        private.put("/secret", b"secret")
        public.put("/here", Answer(status=302, headers={"Location": public.put("/x", b"x")}))
        assert client.fetch(public.url + "/here") == b"x"
        for host in PRIVATE:
            there = f"http://{host}:{private.port}/secret"
            url = public.put("/there", Answer(status=302, headers={"Location": there}))
            try:
                print(client.fetch(url))
            except DownloadError as error:
                print(error)
        assert private.n_connections == 0


if __name__ == "__main__":
    main()
