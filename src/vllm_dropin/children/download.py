"""Downloads what an engine needs from the hub into the hub's own cache.

    download.py REQUEST

Run by file path under the engine's Python, which has huggingface_hub. REQUEST is JSON: `references`, a list of objects
with the fields of `Reference`, and `download_dir` (null: the hub's cache). The token comes as HF_TOKEN. Lines on
standard output that begin with `@download ` carry JSON for the supervisor (see `tell`); all else is log.

Small files come before weights, so that complete weights in the cache mean that the rest is there as well. Files that
are complete are never fetched again; a connection that breaks is taken up where it stopped, by huggingface_hub.
A model that is in the cache already costs no network.
"""

from __future__ import annotations

import concurrent.futures
import errno
import fnmatch
import importlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "@download "
WORKERS = 8
REPORT_EVERY = 1.0
STALE_AFTER = 3600.0
"""Seconds without a write after which a partial file has no writer: a live one fails after ten."""

SMALL = (
    "*.json", "*.jsonl", "*.jinja", "*.txt", "*.model", "*.model.v*", "*.py", "*.tiktoken", "*.yaml", "*.yml",
    "*.vocab", "*.bpe", "*.spm", "*.npy",
)  # fmt: skip
"""What configuration, tokenizers, processors and code read."""
SMALL_SKIP = ("original/*", "onnx/*", "openvino/*", "coreml/*", ".*")
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "*optimizer.pt", "*scheduler.pt", "*rng_state*")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MODULE_WEIGHTS = "[0-9]_*/*.safetensors"
"""sentence-transformers keeps the weights of its further layers in folders such as `2_Dense`."""
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json",
    "*.tiktoken", "*.spm",
)  # fmt: skip
CONFIGS = ("config.json", "params.json", "adapter_config.json")


@dataclass(frozen=True)
class Reference:
    """One repository. `patterns` are weight files by preference: the first that matches any is taken.

    `also` are further files, for which the hub is asked even when the cache is complete. Without `pickles`, weights
    that are Python pickles are refused.
    """

    repo: str
    revision: str | None
    patterns: tuple[str, ...]
    ignore: tuple[str, ...]
    tokenizer: bool
    code: bool
    code_revision: str | None
    also: tuple[str, ...] = ()
    pickles: bool = True

    @property
    def wanted(self) -> str:
        return self.revision or "main"


class Refusal(Exception):
    """A failure that the user can do something about; `kind` says which (the supervisor knows the remedies)."""

    def __init__(self, kind: str, reference: Reference, detail: str = "") -> None:
        super().__init__(detail)
        self.kind, self.reference, self.detail = kind, reference, detail


def tell(**fields: Any) -> None:
    """One line to the supervisor, in one write: other threads write to the same pipe."""
    sys.stdout.write(f"\n{MARK}{json.dumps(fields)}\n")
    sys.stdout.flush()


# What to take


def matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    """The names that match any of the patterns, where `*` crosses folders, as huggingface_hub has it."""
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def small_files(names: list[str]) -> list[str]:
    skip = set(matching(names, SMALL_SKIP))
    return [name for name in matching(names, SMALL) if name not in skip]


def _small_and_also(names: list[str], reference: Reference) -> list[str]:
    return sorted({*small_files(names), *matching(names, reference.also)})


def taken(folder: Path, reference: Reference) -> list[str]:
    """The files of a snapshot that the reference asks for. The cache may hold more of the same commit."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted({*_small_and_also(names, reference), *weight_files(names, reference, read_shards(folder))})


def index_of(pattern: str) -> str | None:
    """The index that lists the shards of a kind of weights."""
    return {
        "*.safetensors": "model.safetensors.index.json",
        "consolidated*.safetensors": "consolidated.safetensors.index.json",
        "*.bin": "pytorch_model.bin.index.json",
    }.get(pattern)


def weight_files(names: list[str], reference: Reference, shards: dict[str, list[str]]) -> list[str]:
    """vLLM's choice of weights: the first pattern that matches a file at the root; of these what the index lists.

    `shards` maps the name of each index that exists to the files that it lists.
    """
    ignored = set(matching(names, (*reference.ignore, "original/*", *NOT_WEIGHTS)))
    names = [name for name in names if name not in ignored]
    for pattern in reference.patterns:
        if not matching([name for name in names if "/" not in name], (pattern,)):
            continue
        if listed := shards.get(index_of(pattern) or ""):
            return sorted({*listed, *matching(names, (MODULE_WEIGHTS,))})
        found = matching(names, (pattern,))
        if not pattern.startswith("consolidated"):
            found = [name for name in found if not Path(name).name.startswith("consolidated")]
        return sorted(found)
    return []


def read_shards(folder: Path) -> dict[str, list[str]]:
    """The weight indexes of a snapshot."""
    shards = {}
    for index in folder.glob("*.index.json"):
        try:
            shards[index.name] = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            continue  # not an index of weights; if it should be one, the check of the weights says so
    return shards


# What is there


def snapshot(cache: Path, repo: str, revision: str) -> Path | None:
    """The folder of a revision in the hub's cache, whose layout is documented by huggingface_hub."""
    home = cache / f"models--{repo.replace('/', '--')}"
    reference = home / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    folder = home / "snapshots" / commit
    return folder if folder.is_dir() else None


def lacking(folder: Path | None, reference: Reference, weights: Path | None) -> tuple[str, ...]:
    """What a cached snapshot lacks for a start without network: `files`, `config`, `weights`, `tokenizer`.

    A snapshot links to complete files only. Whether one of them is missing can be known for sharded weights alone:
    from their index, or from names such as `model-00001-of-00003.safetensors`.
    """
    if folder is None:
        return ("files",)
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.exists() and not path.is_dir()]
    found = []
    if reference.patterns:
        if not any(name in names for name in CONFIGS):
            found.append("config")
        if weights is None or not weights_complete(weights, reference):
            found.append("weights")
    if reference.tokenizer and not matching(names, TOKENIZERS):
        found.append("tokenizer")
    if not names:
        found.append("files")
    return tuple(found)


def weights_complete(folder: Path, reference: Reference) -> bool:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    files = weight_files(names, reference, read_shards(folder))
    if not files:
        return False
    series: dict[tuple[str, int], set[str]] = {}
    for name in files:
        if match := re.search(r"-\d+-of-(\d+)\.\w+$", name):
            series.setdefault((name[: match.start()], int(match[1])), set()).add(name)
    return set(files) <= set(names) and all(len(found) >= count for (_, count), found in series.items())


def code_repositories(folder: Path) -> list[str]:
    """Repositories whose code a configuration names: `"auto_map": {"AutoConfig": "org/name--file.Class"}`."""
    found: set[str] = set()
    for path in folder.glob("*.json"):
        try:
            configuration = json.loads(path.read_bytes())
        except ValueError:
            continue
        entries = configuration.get("auto_map", {}) if isinstance(configuration, dict) else {}
        for entry in entries.values() if isinstance(entries, dict) else ():
            for name in entry if isinstance(entry, list) else (entry,):
                if isinstance(name, str) and "--" in name:
                    found.add(name.split("--")[0])
    return sorted(found)


# Fetching


@dataclass(frozen=True)
class File:
    """One file to fetch at one commit; `folder` is its repository's snapshot in `cache`."""

    reference: Reference
    commit: str
    name: str
    size: int
    cache: Path

    @property
    def blobs(self) -> Path:
        return self.cache / f"models--{self.reference.repo.replace('/', '--')}" / "blobs"

    @property
    def path(self) -> Path:
        return self.blobs.parent / "snapshots" / self.commit / self.name


class Progress:
    """Tells once a second how many bytes are on the disk, by looking: that holds for every way of transfer."""

    def __init__(self) -> None:
        self._files: list[File] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, files: list[File]) -> None:
        with self._lock:
            self._files += files

    def tell(self) -> None:
        with self._lock:
            files = list(self._files)
        done = [file for file in files if file.path.exists()]
        partial = sum(path.stat().st_size for path in own_partials())
        total = sum(file.size for file in files)
        here = min(total, sum(file.size for file in done) + partial)
        tell(event="progress", done=here, total=total, files_done=len(done), files=len(files))

    def _run(self) -> None:
        while True:
            time.sleep(REPORT_EVERY)
            try:
                self.tell()
            except OSError:
                continue  # a file was renamed while we looked


def own_partials() -> list[Path]:
    """The partial files that this very process writes."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = link.readlink()
        except OSError:
            continue
        if target.name.endswith(".incomplete") and target.is_file():
            found.append(target)
    return found


def drop_stale_partials(blobs: Path) -> None:
    """Remove what killed processes left: huggingface_hub names partial files anew each time and never reuses them."""
    for path in blobs.glob("*.incomplete"):
        try:
            if time.time() - path.stat().st_mtime > STALE_AFTER:
                path.unlink()
        except OSError:
            continue  # another process was faster


def stop(*_: object) -> None:
    """Leave at once, without the partial files."""
    for path in own_partials():
        path.unlink(missing_ok=True)
    os._exit(143)


class Downloader:
    """Brings references into the cache, one after the other, files side by side."""

    def __init__(self, cache: Path, weights_cache: Path) -> None:
        hub = importlib.import_module("huggingface_hub")
        self._cache, self._weights_cache = cache, weights_cache
        self._api = hub.HfApi(token=os.environ.get("HF_TOKEN") or None)
        self._download = hub.hf_hub_download
        self._progress = Progress()

    def bring(self, reference: Reference) -> Path:
        """Everything that the reference needs. Returns its snapshot."""
        info = self._api.model_info(reference.repo, revision=reference.wanted, files_metadata=True)
        commit = str(info.sha)
        sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
        names = sorted(sizes)

        def files(chosen: list[str], cache: Path) -> list[File]:
            return [File(reference, commit, name, sizes.get(name, 0), cache) for name in chosen]

        small, weights = files(_small_and_also(names, reference), self._cache), []
        folder = File(reference, commit, "", 0, self._cache).path
        if reference.patterns:
            self._fetch([file for file in small if file.name.endswith(".index.json")])
            weights = files(self._choose(reference, names, folder), self._weights_cache)
            if self._weights_cache != self._cache:
                weights += files([n for n in names if n.endswith(".index.json")], self._weights_cache)
        self._progress.add([*small, *weights])
        for cache in (self._cache, self._weights_cache):
            check_space([file for file in (*small, *weights) if file.cache == cache and not file.path.exists()])
        self._fetch(small)
        self._fetch(weights)
        for cache in (self._cache, self._weights_cache) if weights else (self._cache,):
            set_revision(File(reference, commit, "", 0, cache), reference.wanted)
        self._progress.tell()
        return folder

    def _choose(self, reference: Reference, names: list[str], folder: Path) -> list[str]:
        chosen = weight_files(names, reference, read_shards(folder))
        if absent := sorted(set(chosen) - set(names)):
            raise Refusal("weights", reference, f"its index lists {absent[0]}, which is not there")
        if not chosen:
            raise Refusal("weights", reference, f"no file matches {' or '.join(reference.patterns)}")
        if not reference.pickles and (refused := matching(chosen, PICKLES)):
            raise Refusal("pickle", reference, refused[0])
        return chosen

    def _fetch(self, files: list[File]) -> None:
        """Fetch what is not there yet. The first failure ends it."""
        todo = [file for file in files if not file.path.exists()]
        for blobs in {file.blobs for file in todo}:
            drop_stale_partials(blobs)
        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            tasks = [pool.submit(self._fetch_one, file) for file in todo]
            try:
                for task in concurrent.futures.as_completed(tasks):
                    task.result()
            except BaseException:
                for task in tasks:
                    task.cancel()
                raise

    def _fetch_one(self, file: File) -> None:
        self._download(
            file.reference.repo,
            file.name,
            revision=file.commit,
            cache_dir=str(file.cache),
            token=os.environ.get("HF_TOKEN") or None,
        )


def set_revision(file: File, revision: str) -> None:
    """Record which commit a branch or tag is, last of all: an offline start finds the snapshot by it."""
    if revision == file.commit:
        return
    path = file.blobs.parent / "refs" / revision
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(file.commit)
    temporary.replace(path)


def check_space(files: list[File]) -> None:
    """Raises Refusal when the disk can't hold the files."""
    if not files:
        return
    cache = files[0].cache
    cache.mkdir(parents=True, exist_ok=True)
    needed, free = sum(file.size for file in files), shutil.disk_usage(cache).free
    if needed > free:
        detail = f"{needed / 1e9:.1f} GB are needed in {cache}, {free / 1e9:.1f} GB are free"
        raise Refusal("disk", files[0].reference, detail)


# The whole


def refusal(error: Exception, reference: Reference) -> Refusal:
    """What an exception of huggingface_hub or of the system means to the user."""
    if isinstance(error, Refusal):
        return error
    errors = importlib.import_module("huggingface_hub.errors")
    status = getattr(getattr(error, "response", None), "status_code", None)
    detail = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    kinds: list[tuple[type[Exception], str]] = [
        (errors.GatedRepoError, "gated"),
        (errors.RevisionNotFoundError, "revision"),
        (errors.RepositoryNotFoundError, "repository"),
        (errors.HFValidationError, "name"),
    ]
    for known, kind in kinds:
        if isinstance(error, known):
            return Refusal(kind, reference, detail)
    if status in (401, 403):
        return Refusal("forbidden", reference, detail)
    if status is None and isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Refusal("disk", reference, detail)
    if status is None and isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Refusal("cache", reference, f"{error.filename or ''}: {error.strerror}")
    return Refusal("network", reference, detail)


def bring_all(
    references: list[Reference], cache: Path, weights_cache: Path, offline: bool
) -> list[tuple[str, Path, list[str]]]:
    """Every reference and the code that they name, each from the cache where it is complete.

    Gives for each its repository, its snapshot and the files in it that were asked for.
    """
    downloader: Downloader | None = None
    queue, known, found = list(references), set(references), []
    while queue:
        reference = queue.pop(0)
        folder = snapshot(cache, reference.repo, reference.wanted)
        lacks = lacking(folder, reference, snapshot(weights_cache, reference.repo, reference.wanted))
        startable = not set(lacks) - {"tokenizer"}  # whether it lacks a tokenizer is a guess
        if offline and not startable:
            raise Refusal("offline", reference, ", ".join(lacks))
        if (lacks or reference.also) and not offline:
            try:
                downloader = downloader or Downloader(cache, weights_cache)
                folder = downloader.bring(reference)
            except Exception as error:
                reason = refusal(error, reference)
                if not (startable and reason.kind == "network"):
                    raise reason from error
                print(f"{reference.repo} is used as it is in the cache: {reason.detail}", flush=True)
        assert folder is not None  # neither complete nor fetched has been refused above
        found.append((reference.repo, folder, taken(folder, reference)))
        for repo in code_repositories(folder) if reference.code else ():
            code = Reference(repo, reference.code_revision, (), (), False, False, None)
            if code not in known:
                known.add(code)
                queue.append(code)
    return found


def _reference(entry: dict[str, Any]) -> Reference:
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    return Reference(**fields)


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, stop)
    request = json.loads(arguments[0])
    references = [_reference(entry) for entry in request["references"]]
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours are told to the supervisor
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    constants = importlib.import_module("huggingface_hub.constants")
    cache = Path(constants.HF_HUB_CACHE)
    weights_cache = Path(request["download_dir"]) if request["download_dir"] else cache
    try:
        found = bring_all(references, cache, weights_cache, offline=constants.HF_HUB_OFFLINE)
    except Refusal as error:
        tell(
            event="refusal",
            kind=error.kind,
            repo=error.reference.repo,
            revision=error.reference.revision,
            detail=error.detail,
            cache=str(cache),
        )
        return 1
    snapshots = [{"repo": repo, "folder": str(folder), "files": files} for repo, folder, files in found]
    tell(event="finished", snapshots=snapshots)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
