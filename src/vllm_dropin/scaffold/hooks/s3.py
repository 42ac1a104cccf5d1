"""Fetches the model from S3, or a store that speaks its protocol, into vllm/ before the engine starts.

Runtime parameters: model_location (s3://bucket/prefix), s3_credential, s3_endpoint_url. Without a credential boto3
looks in its usual places: environment, files, the role of the machine.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from datarobot_drum import RuntimeParameters


def load_model(code_dir: str) -> None:
    """Called once, before the engine starts."""
    into_place(Path(code_dir) / "vllm", fetch)


def fetch(folder: Path) -> None:
    bucket, prefix = split(location())
    client = connect()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    names = (item["Key"] for page in pages for item in page.get("Contents", ()))
    for name, path in below(prefix, names):
        print(f"fetching s3://{bucket}/{name}", flush=True)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket, name, str(folder / path))


def split(place: str) -> tuple[str, str]:
    """`s3://bucket/a/b` as bucket and prefix."""
    url = urlsplit(place)
    if url.scheme != "s3" or not url.netloc:
        raise ValueError(f"model_location is {place!r}; it has to look like s3://bucket/folder")
    return url.netloc, url.path.strip("/")


def connect() -> Any:
    import boto3

    credential = parameter("s3_credential") or {}
    return boto3.client(
        "s3",
        endpoint_url=parameter("s3_endpoint_url") or None,
        aws_access_key_id=credential.get("awsAccessKeyId"),
        aws_secret_access_key=credential.get("awsSecretAccessKey"),
        aws_session_token=credential.get("awsSessionToken"),
    )


def location() -> str:
    """The parameter that says where the weights are. Raises ValueError when it is not set."""
    place = parameter("model_location")
    if not place:
        raise ValueError("the runtime parameter model_location is not set: it says where the weights are")
    return str(place)


def below(prefix: str, names: Iterable[str]) -> Iterator[tuple[str, PurePosixPath]]:
    """The names under `prefix` with their paths relative to it. Raises ValueError for one that would lead elsewhere."""
    folder = prefix.strip("/") + "/" if prefix.strip("/") else ""
    for name in names:
        path = PurePosixPath(name.removeprefix(folder))
        if name.endswith("/") or not name.startswith(folder):
            continue  # a stand-in for a folder, or a neighbour: `model-2/` when `model` was asked for
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name} would be written outside of the model folder")
        yield name, path


def parameter(name: str) -> Any:
    """A runtime parameter; None when the folder does not define it, or nobody set it."""
    return RuntimeParameters.get(name) if RuntimeParameters.has(name) else None


def into_place(target: Path, fetch: Callable[[Path], None]) -> None:
    """Fill `target` by `fetch`, all or nothing: it writes into a draft beside it, which is renamed when it is whole.

    A start that is cut off leaves no half model behind, and two starts at once don't write into each other.
    """
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # goes with the process, however it ends
        if target.is_dir() and any(not entry.name.startswith(".") for entry in target.iterdir()):
            print(f"{target} has weights already: nothing is fetched")
            return
        for leftover in target.parent.glob(".vllm-draft-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(prefix=".vllm-draft-", dir=target.parent))
        try:
            fetch(draft)
            if not any(draft.iterdir()):
                raise FileNotFoundError("there are no files at the place that model_location names")
            draft.chmod(0o755)  # the engine may run as another user
            shutil.rmtree(target, ignore_errors=True)  # nothing in it but hidden files, as seen above
            draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        print(f"weights are in {target}")
    finally:
        os.close(descriptor)
