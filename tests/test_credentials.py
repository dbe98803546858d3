"""Credentials: from everywhere, renewed in time, the same for all clients, and told to nobody."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import ROOT
from httpserver import serving
from jobfolder import JobFolder
from maxcompute.server import MaxCompute
from ossserver import OssServer, serving_oss
from stsserver import ROLE, StsServer, serving_sts
from Tea.core import TeaCore
from test_maxcompute import JOB, SCHEMA, TYPES, URI, rows_of_photos, titles_until_the_end
from test_remote_http import job_of, self_signed

from evmp.child import call_in_child
from evmp.errors import CredentialsError, DownloadError, SinkError, SourceError
from evmp.job import Job
from evmp.key import table_field
from evmp.remote.oss import OssRemote
from evmp.source import maxcompute, open_source
from evmp.target import table

BODY = b"0123456789" * 1000
KEY_ID, SECRET = "LTAI-who-assumes", "secret-of-who-assumes"
# What a process does whose environment is what the test is about; the library reads it once.
FETCH = """
import sys
from test_remote_http import job_of
from evmp.remote.oss import OssRemote
for _ in range(3):
    print(len(OssRemote(job_of(ossHost=sys.argv[1])).fetch("oss://bkt/x")))
"""


@pytest.fixture
def oss() -> Iterator[OssServer]:
    """An OSS that knows no key but those that are lent."""
    with serving_oss() as server:
        server.keys.clear()
        server.objects["bkt"] = {"x": BODY}
        yield server


@pytest.fixture
def sts(
    oss: OssServer, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StsServer]:
    """An STS that lends keys for that OSS, to the one that is in the environment."""
    monkeypatch.setenv("ALIBABA_CLOUD_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("ALIBABA_CLOUD_ACCESS_KEY_SECRET", SECRET)
    certificate = self_signed(tmp_path_factory.mktemp("sts"))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serving_sts(certificate, KEY_ID, SECRET, granting(oss)) as server:
        yield server
        for session in TeaCore._sessions.values():
            session.close()


def granting(oss: OssServer) -> Callable[[str, str, str], None]:
    def grant(key_id: str, secret: str, token: str) -> None:
        oss.keys[key_id], oss.tokens[key_id] = secret, token

    return grant


def role_of(sts: StsServer, oss: OssServer, **keys: Any) -> Job:
    return job_of(**{"ossHost": oss.endpoint, "arn": ROLE, "sts_endpoint": sts.endpoint, **keys})


def test_a_role_is_lent_once_for_many_objects(sts: StsServer, oss: OssServer) -> None:
    with closing(OssRemote(role_of(sts, oss))) as remote, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(remote.fetch, ["oss://bkt/x"] * 40)) == [BODY] * 40
    assert sts.n_lent == 1


def test_each_process_asks_by_connections_of_its_own(sts: StsServer, oss: OssServer) -> None:
    sts.seconds = 15 * 60

    def fetch() -> list[bytes]:
        with closing(OssRemote(role_of(sts, oss))) as remote:
            return [remote.fetch("oss://bkt/x") for _ in range(3)]

    assert fetch() == call_in_child(fetch) == call_in_child(fetch)
    assert (sts.n_connections, sts.n_lent) == (3, 9)


def test_a_role_is_lent_again_before_its_keys_expire(sts: StsServer, oss: OssServer) -> None:
    sts.seconds = 15 * 60  # the library renews what does not hold longer

    with closing(OssRemote(role_of(sts, oss))) as remote:
        for n_lent in range(1, 4):
            oss.keys.clear()
            assert remote.fetch("oss://bkt/x") == BODY
            assert sts.n_lent == n_lent

        sts.faults = [503] * 9
        assert remote.fetch("oss://bkt/x") == BODY  # by the last ones, as long as they hold


def test_a_role_reads_tables_too(sts: StsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with MaxCompute() as service:
        service.add("photos", TYPES).put(rows_of_photos())
        monkeypatch.setenv("ODPS_ENDPOINT", service.environment()["ODPS_ENDPOINT"])
        sts.grant = lambda key_id, *rest: service.lent.update({key_id: rest})
        job = Job(**JOB, arn=ROLE, sts_endpoint=sts.endpoint)

        sts.faults = [503]
        with closing(open_source(job)) as source:
            assert len(list(source.read(0, 100))) == 100
        assert sts.n_lent == 1

        sts.faults = [403]
        with pytest.raises(CredentialsError, match="refused by STS: 403 NoPermission"):
            open_source(job).describe()
        gc.collect()  # pyodps' readers hold themselves, and with them their connections


def test_a_role_writes_tables_and_is_waited_for(
    sts: StsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maxcompute, "START_SECONDS", 0.3)
    monkeypatch.setattr(table, "START_SECONDS", 0.3)
    with MaxCompute() as service:
        monkeypatch.setenv("ODPS_ENDPOINT", service.environment()["ODPS_ENDPOINT"])
        sts.grant = lambda key_id, *rest: service.lent.update({key_id: rest})
        output = {"output_oss_file": "", "output_table": "odps://shop/tables/results"}
        job = Job(**{**JOB, **output}, arn=ROLE, sts_endpoint=sts.endpoint)
        keys = tuple(table_field(name, pa.string()) for name in job.reserved_columns)

        table.OutputTable(job, keys).prepare()
        assert service.tables["results"].lifecycle == 10

        sts.faults = [503] * 1000
        with pytest.raises(SinkError, match="cannot be reached: STS answers with status 503"):
            table.OutputTable(job, keys).standing()
        with pytest.raises(SourceError, match="cannot be looked at: STS answers with status 503"):
            open_source(job).describe()
        gc.collect()


@pytest.mark.parametrize(
    ("keys", "fault", "message"),
    [
        (
            {"arn": "acs:ram::1:role/other"},
            0,
            "the role is refused by STS: 404 EntityNotExist.Role",
        ),
        ({}, 403, "the role is refused by STS: 403 NoPermission"),
        ({}, 503, "STS answers with status 503; tried 2 times"),
        ({"sts_endpoint": "127.0.0.1:9"}, 0, "no credentials can be had now"),
    ],
)
def test_a_role_that_is_not_lent_is_told_in_few_words(
    sts: StsServer,
    oss: OssServer,
    capfd: pytest.CaptureFixture[str],
    keys: dict[str, str],
    fault: int,
    message: str,
) -> None:
    sts.faults = [fault] * 2 if fault else []

    job = role_of(sts, oss, download_retries=1, **keys)
    with closing(OssRemote(job)) as remote, pytest.raises(DownloadError) as caught:
        remote.fetch("oss://bkt/x")

    assert str(caught.value).startswith(message)
    assert KEY_ID not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_nobody_is_told(
    job: JobFolder, sts: StsServer, oss: OssServer, photo_file: Callable[..., bytes]
) -> None:
    oss.objects["bkt"] = {f"{n}.jpg": photo_file("coffee", size=(60, 40)) for n in range(10)}
    oss.fail("3.jpg", 403, 403)
    oss.objects["results"] = {}
    urls = [f"oss://bkt/{n}.jpg" for n in range(60)]
    rows = pa.table({"id": range(60), "image": urls, "name": ["x"] * 60}, SCHEMA)
    sts.seconds = 15 * 60
    with MaxCompute() as service:
        service.add("photos", TYPES).put(rows)

        def grant(key_id: str, secret: str, token: str) -> None:
            granting(oss)(key_id, secret, token)
            service.lent[key_id] = (secret, token)

        sts.grant = grant
        job.write(
            input_table=URI,
            image_type="url",
            arn=ROLE,
            sts_endpoint=sts.endpoint,
            ossHost=oss.endpoint,
            odps_endpoint=service.environment()["ODPS_ENDPOINT"],
            output_oss_file="oss://results/out.jsonl",
            staging="oss://results/staging",
            keep_staging=True,
            max_error_fraction=1,
            batch_size=4,
        )
        process = job.start(env={"DEBUG": "sdk"})
        titles = titles_until_the_end(process)
        told = [*process.communicate(), *titles]

    assert process.returncode == 0, told
    kept = oss.objects["results"]
    assert len(kept["out.jsonl"].splitlines()) == 60 and len(kept) > 3
    assert kept["out.jsonl"].count(b"NoSuchKey") == 50
    told += [data.decode("latin-1") for data in kept.values()]
    told += [file.read_text("latin-1") for file in job.path.rglob("*") if file.is_file()]
    assert not any(
        secret in text for text in told for secret in (SECRET, *sts.secrets, *oss.keys, KEY_ID)
    )


def test_what_urls_hold_is_told_to_nobody(
    job: JobFolder,
    tiny_model: Path,
    photo_file: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(job.path / "cache"))
    archive = shutil.make_archive(str(job.path / "model"), "gztar", tiny_model)
    with serving() as web:
        own = web.url.replace("://", "://someone:pass-word@")
        image = photo_file("coffee", size=(60, 40))
        lines = [web.put(f"/{n}.jpg", image) for n in range(9)]
        web.put("/in.txt?signature=sig-nature", "\n".join([*lines, f"{web.url}/none"]).encode())
        web.put("/model.tar.gz?signature=sig-nature", Path(archive).read_bytes())
        job.write(
            input_table=None,
            reserved_columns=None,
            input_oss_file=f"{own}/in.txt?signature=sig-nature",
            model_path=f"{own}/model.tar.gz?signature=sig-nature",
            allow_private_hosts=True,
            keep_staging=True,
        )
        checked = job.run("--check")
        process = job.start()
        titles = titles_until_the_end(process)
        told = [checked.stdout, checked.stderr, *process.communicate(), *titles]
        web.put("/in.txt?signature=sig-nature", b"changed")
        changed = job.run()
        web.put("/model.tar.gz?signature=sig-nature", b"damaged")
        damaged = job.run("--fresh")

    assert (checked.returncode, process.returncode) == (0, 0), told
    assert changed.returncode and damaged.returncode
    told += [changed.stdout, changed.stderr, damaged.stdout, damaged.stderr]
    (job.path / "job.yaml").unlink()
    told += [file.read_text("latin-1") for file in job.path.rglob("*") if file.is_file()]
    told += [str(path) for path in job.path.rglob("*")]
    assert not any(secret in text for text in told for secret in ("pass-word", "sig-nature"))


def test_a_library_that_is_missing_is_named(
    sts: StsServer, oss: OssServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "alibabacloud_credentials", None)
    monkeypatch.setitem(sys.modules, "alibabacloud_credentials.provider", None)

    what = "need alibabacloud-credentials: pip install"
    with closing(OssRemote(role_of(sts, oss))) as remote, pytest.raises(DownloadError, match=what):
        remote.fetch("oss://bkt/x")


def fetch(oss: OssServer, home: Path, **environment: str) -> str:
    """Return what FETCH prints."""
    done = subprocess.run(
        [sys.executable, "-c", FETCH, oss.endpoint],
        env={"HOME": str(home), "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT / 'config'}", **environment},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def test_profile_files_have_credentials(oss: OssServer, tmp_path: Path) -> None:
    oss.keys[KEY_ID] = SECRET
    ini = tmp_path / "credentials.ini"
    ini.write_text(
        f"[work]\ntype = access_key\naccess_key_id = {KEY_ID}\naccess_key_secret = {SECRET}\n"
    )
    keys = {"access_key_id": KEY_ID, "access_key_secret": SECRET}
    profile = {"name": "default", "mode": "AK", **keys}
    cli = tmp_path / ".aliyun/config.json"
    cli.parent.mkdir()
    cli.write_text(json.dumps({"current": "default", "profiles": [profile]}))
    there = {"ALIBABA_CLOUD_CREDENTIALS_FILE": str(ini), "ALIBABA_CLOUD_PROFILE": "work"}
    nowhere = {"ALIBABA_CLOUD_ECS_METADATA_DISABLED": "true"}

    assert fetch(oss, tmp_path).split() == ["10000"] * 3
    cli.unlink()
    assert fetch(oss, tmp_path, **there).split() == ["10000"] * 3
    assert "no credentials; set OSS_ACCESS_KEY_ID" in fetch(oss, tmp_path, **nowhere)


class Metadata(BaseHTTPRequestHandler):
    """What a machine of Alibaba Cloud is told of itself, here by a proxy on the way there."""

    answers: dict[str, str]

    def log_message(self, *arguments: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        path = self.path.removeprefix("http://100.100.100.200")
        if self.command == "GET":
            assert self.headers["X-aliyun-ecs-metadata-token"] == "a token"
        body = self.answers[path].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET


def test_the_role_of_the_machine_has_credentials(oss: OssServer, tmp_path: Path) -> None:
    granting(oss)("STS.of-ecs", "secret-of-ecs", "token-of-ecs")
    about = {
        "Code": "Success",
        "AccessKeyId": "STS.of-ecs",
        "AccessKeySecret": "secret-of-ecs",
        "SecurityToken": "token-of-ecs",
        "Expiration": "2099-01-01T00:00:00Z",
    }
    place = "/latest/meta-data/ram/security-credentials/"
    Metadata.answers = {
        "/latest/api/token": "a token",
        place: "role-of-ecs",
        f"{place}role-of-ecs": json.dumps(about),
    }
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        proxy = f"http://127.0.0.1:{server.server_address[1]}"
        assert fetch(oss, tmp_path, HTTP_PROXY=proxy).split() == ["10000"] * 3
        server.shutdown()
