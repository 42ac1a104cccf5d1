"""Fetches the model from Google Cloud Storage into vllm/ before the engine starts.

Runtime parameters: model_location (gs://bucket/prefix), gcp_credential (a service account's key). Without a credential
the client looks in its usual places: GOOGLE_APPLICATION_CREDENTIALS, the account of the machine.
"""

import fcntl
import json
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
    blobs = {blob.name: blob for blob in client.list_blobs(bucket, prefix=prefix or None)}
    for name, path in below(prefix, blobs):
        print(f"fetching gs://{bucket}/{name}", flush=True)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        blobs[name].download_to_filename(str(folder / path))


def split(place: str) -> tuple[str, str]:
    """`gs://bucket/a/b` as bucket and prefix."""
    url = urlsplit(place)
    if url.scheme != "gs" or not url.netloc:
        raise ValueError(f"model_location is {place!r}; it has to look like gs://bucket/folder")
    return url.netloc, url.path.strip("/")


def connect() -> Any:
    from google.cloud import storage

    key = (parameter("gcp_credential") or {}).get("gcpKey")
    if not key:
        return storage.Client()
    account = json.loads(key) if isinstance(key, str) else key  # the platform hands out either
    return storage.Client.from_service_account_info(account, project=account.get("project_id"))


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
