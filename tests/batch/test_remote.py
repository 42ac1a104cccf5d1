"""Inputs and outputs on a real S3 server: moto's, on this machine."""

from __future__ import annotations

import gc
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.batch.s3 import S3Server
from vllm_dropin.batch.inputs import InputFile, find_inputs
from vllm_dropin.batch.outputs import plan_output
from vllm_dropin.batch.records import Source
from vllm_dropin.batch.writing import Writer, open_writer
from vllm_dropin.errors import ConfigurationError, InputOutputError
from vllm_dropin.scoring.results import RowResult

ROWS = b"x\n" + b"".join(b"%d\n" % at for at in range(5000))


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def bucket(server: S3Server, environ: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    return make_bucket(server, environ, f"b{abs(hash(request.node.name))}")


def make_bucket(server: S3Server, environ: pytest.MonkeyPatch, name: str) -> str:
    environ.setenv("AWS_ENDPOINT_URL", server.url)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    remote().mkdir(name)
    return f"s3://{name}"


def remote() -> Any:
    return fsspec.filesystem("s3")


def one(name: str) -> InputFile:
    (file,) = find_inputs([name])
    return file


def count(name: str) -> int:
    return sum(len(batch) for batch in Source([one(name)]).read())


def written(target: str) -> Writer:
    """A writer that has been given rows, and is still open."""
    rows = Source([one("memory://rows.csv")])
    writer = open_writer(target, plan_output(target, rows), rows)
    for batch in rows.read():
        writer.write([(record, RowResult(record.row_id, 0, ("a",), ("stop",))) for record in batch])
    return writer


@pytest.fixture(autouse=True)
def _rows_in_memory() -> None:
    fsspec.filesystem("memory").pipe("/rows.csv", ROWS)


def test_files_are_found_by_name_glob_and_folder(bucket: str) -> None:
    for name in ("d/b.csv", "d/a.csv", "d/.hidden.csv", "d/notes.txt", "d/sub/c.csv"):
        remote().pipe(f"{bucket}/{name}", ROWS)
    assert [file.name for file in find_inputs([f"{bucket}/d"])] == [f"{bucket}/d/a.csv", f"{bucket}/d/b.csv"]
    assert [file.name for file in find_inputs([f"{bucket}/d/[ab]*.csv"])] == [f"{bucket}/d/a.csv", f"{bucket}/d/b.csv"]
    assert len(find_inputs([f"{bucket}/d/**/*.csv"])) == 4
    file = one(f"{bucket}/d/a.csv")
    assert (file.size, file.format, file.rereadable) == (len(ROWS), "csv", True)


def test_every_format_is_read(bucket: str) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"x": [str(at) for at in range(5000)]}), table)
    for name, data in (("a.csv", ROWS), ("a.csv.gz", gzip.compress(ROWS)), ("a.parquet", table.getvalue())):
        remote().pipe(f"{bucket}/{name}", data)
        assert count(f"{bucket}/{name}") == 5000


def test_a_fingerprint_needs_no_download_and_tells_contents_apart(bucket: str) -> None:
    remote().pipe(f"{bucket}/a.csv", ROWS)
    file = one(f"{bucket}/a.csv")
    first = file.fingerprint()
    assert first == file.fingerprint()
    assert "ETag:" in first and f"size:{len(ROWS)}" in first
    remote().pipe(f"{bucket}/a.csv", ROWS.replace(b"1", b"2"))
    assert file.fingerprint() != first


@pytest.mark.parametrize("name", ["none.csv", "none*.csv", "none/"])
def test_what_is_not_there_is_the_configurations_fault(bucket: str, name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"does not exist|no file matches"):
        find_inputs([f"{bucket}/{name}"])


def test_missing_credentials_are_told(server: S3Server, environ: pytest.MonkeyPatch) -> None:
    environ.setenv("AWS_ENDPOINT_URL", server.url)
    environ.delenv("AWS_ACCESS_KEY_ID")
    environ.delenv("AWS_SECRET_ACCESS_KEY")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ConfigurationError, match="no credentials for s3://") as caught:
        find_inputs(["s3://bucket/a.csv"])
    assert "AWS_ACCESS_KEY_ID" in caught.value.remedy


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "csv.zst", "jsonl", "parquet"])
def test_an_output_appears_when_it_is_closed(bucket: str, ending: str) -> None:
    target = f"{bucket}/o.{ending}"
    writer = written(target)
    assert not remote().exists(target)
    writer.close()
    remote().invalidate_cache()
    assert count(target) == 5000


def test_an_output_that_is_given_up_does_not_appear(bucket: str) -> None:
    for ending in ("csv", "csv.gz", "parquet"):
        target = f"{bucket}/o.{ending}"
        written(target).abort()
        gc.collect()
        remote().invalidate_cache()
        assert not remote().exists(target)


def test_an_output_needs_its_bucket(bucket: str) -> None:
    with pytest.raises((ConfigurationError, InputOutputError), match="nowhere"):
        written(f"{bucket}-nowhere/o.csv").close()


def test_a_server_that_vanishes_is_an_error_that_names_the_file(environ: pytest.MonkeyPatch) -> None:
    environ.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    own = S3Server()
    try:
        bucket = make_bucket(own, environ, "bucket")
        remote().pipe(f"{bucket}/a.csv", b"x\n" + (b"1" * 4095 + b"\n") * 4000)
        file = one(f"{bucket}/a.csv")
        batches = Source([file]).read()
        assert len(next(batches)) == 1024
        writer = written(f"{bucket}/o.csv")
    finally:
        own.stop()
    with pytest.raises(InputOutputError, match=r"s3://bucket/a\.csv can't be read: ") as caught:
        list(batches)
    assert caught.value.exit_code == 74
    with pytest.raises(InputOutputError, match=r"s3://bucket/o\.csv can't be written: "):
        writer.close()
    with pytest.raises(InputOutputError, match=r"s3://bucket/a\.csv can't be read: "):
        file.fingerprint()
    gc.collect()


def test_files_in_memory(environ: pytest.MonkeyPatch) -> None:
    file = one("memory://rows.csv")
    assert file.size == len(ROWS)
    assert count("memory://rows.csv") == 5000
    first = file.fingerprint()
    assert first == file.fingerprint()
