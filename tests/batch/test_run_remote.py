"""Whole runs of `vllm-dropin score` on S3: the answers are kept here until all are there, and S3 may go away."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.batch.conftest import Scoring
from tests.batch.s3 import S3Server
from tests.conftest import wait_until

fsspec = pytest.importorskip("fsspec")

ROWS = b"promptText\n" + b"".join(b"delay=0.02 row %d\n" % place for place in range(400))


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.url,
        "AWS_MAX_ATTEMPTS": "2",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.stop()


def fill(server: S3Server) -> None:
    """The bucket with its input; a server that is started again has forgotten both."""
    remote = fsspec.filesystem("s3", client_kwargs={"endpoint_url": server.url}, skip_instance_cache=True)
    remote.mkdir("bucket")
    remote.pipe("bucket/rows.csv", ROWS)


def read(server: S3Server, path: str) -> bytes:
    remote = fsspec.filesystem("s3", client_kwargs={"endpoint_url": server.url}, skip_instance_cache=True)
    content: bytes = remote.cat(path)
    return content


def test_from_s3_to_s3(scoring: Scoring, s3: S3Server) -> None:
    fill(s3)
    scoring.run("s3://bucket/rows.csv", "-o", "s3://bucket/out/answers.jsonl.gz")
    scoring.run("s3://bucket/rows.csv", "-o", "local.jsonl.gz")
    assert read(s3, "bucket/out/answers.jsonl.gz") == (scoring.folder / "local.jsonl.gz").read_bytes()
    assert "exists" in scoring.run("s3://bucket/rows.csv", "-o", "s3://bucket/out/answers.jsonl.gz", code=78).stderr
    assert not list((scoring.folder / "state").rglob("manifest.json"))


def test_s3_may_vanish_and_come_back(scoring: Scoring, s3: S3Server) -> None:
    """It goes away while rows are asked: the input has been read, the output can't be written."""
    fill(s3)
    words = ("s3://bucket/rows.csv", "-o", "s3://bucket/answers.csv")
    process = scoring.start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: scoring.engine.stats()["finished"] > 50, 30)
    s3.stop()
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 74, errors
    assert "s3://bucket/" in errors and "same command" in errors and "Traceback" not in errors
    asked = scoring.engine.stats()["finished"]
    assert scoring.run(*words, code=74).stderr  # still away
    again = S3Server(s3.port)
    try:
        fill(again)
        scoring.run(*words)
        assert read(again, "bucket/answers.csv").count(b"\n") == 401
    finally:
        again.stop()
    assert asked <= scoring.engine.stats()["finished"] == 400
