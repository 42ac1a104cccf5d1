"""The image context: its files, and writing them whole or not at all, the same bytes for the same inputs."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO

from vllm_dropin import __version__
from vllm_dropin.environment import dockerfile, sbom, wheel
from vllm_dropin.environment.image import Image
from vllm_dropin.environment.wheelhouse import WheelFile
from vllm_dropin.errors import ConfigurationError, InputOutputError

ARCHIVES = (".tar.gz", ".tgz", ".tar")
MTIME = 315532800
"""1980-01-01: the same for every file, and none that tar warns of."""


@dataclass(frozen=True)
class ContextFile:
    """A file of the context. `data` is its bytes, or the file that has them: a wheel can be large."""

    path: str
    data: bytes | Path
    executable: bool = False

    @property
    def mode(self) -> int:
        return 0o755 if self.executable else 0o644

    @property
    def size(self) -> int:
        return self.data.stat().st_size if isinstance(self.data, Path) else len(self.data)

    def open(self) -> IO[bytes]:
        return self.data.open("rb") if isinstance(self.data, Path) else io.BytesIO(self.data)


@dataclass(frozen=True)
class Written:
    """What `write` left: for an archive, with the SHA-256 of its bytes."""

    path: Path
    size: int
    sha256: str | None


def assemble(image: Image, command: str, wheels: Sequence[WheelFile] | None = None) -> tuple[ContextFile, ...]:
    """All files of the context, sorted by path. `command` is told in the README; `wheels` are a wheelhouse's."""
    ours = wheel.build()
    hashes = {file.pin.purl: file.sha256 for file in wheels or ()}
    texts = {
        "Dockerfile": dockerfile.render(image, wheelhouse=wheels is not None),
        "README.md": _readme(image, command, ours.name, wheels is not None),
        "env_info.json": image.env_info(),
        "image_check.py": _shipped("image_check.py"),
        "requirements/vllm-dropin.lock": f"./{ours.name} --hash=sha256:{ours.sha256}\n",
        "sbom.cdx.json": sbom.render(image, ours, hashes),
        "start_server.sh": _shipped("start_server.sh"),
        **{lock.path: lock.text for lock in image.locks},
    }
    files = [ContextFile(path, text.encode(), path.endswith(".sh")) for path, text in texts.items()]
    files.append(ContextFile(ours.name, ours.data))
    files += [ContextFile(f"wheels/{file.path.name}", file.path) for file in wheels or ()]
    return tuple(sorted(files, key=lambda file: file.path))


def check_output(output: Path) -> None:
    """Raises ConfigurationError for a place where nothing can be written, before any work is done."""
    if not output.absolute().parent.is_dir():
        raise ConfigurationError(f"--output: there is no folder {output.absolute().parent}", "Make it, or correct it.")
    if is_archive(output):
        if output.is_dir():
            raise ConfigurationError(f"--output: {output} is a folder", "Name a file that ends in .tar.gz.")
        return
    if output.suffix in (".zip", ".gz", ".bz2", ".xz", ".zst"):
        raise ConfigurationError(
            f"--output: {output.name} is no kind of archive that is written", f"Use {', '.join(ARCHIVES)} or a folder."
        )
    if output.exists() and not _is_ours(output):
        raise ConfigurationError(
            f"--output: {output} has something else in it than an image context",
            "Name a new or an empty folder, or one that `vllm-dropin build` wrote.",
        )


def is_archive(output: Path) -> bool:
    return output.name.endswith(ARCHIVES)


def write(files: Sequence[ContextFile], output: Path) -> Written:
    """Write an archive or a folder, by the name of `output`. Raises InputOutputError; then nothing is left behind."""
    check_output(output)
    try:
        if is_archive(output):
            return _write_archive(files, output)
        return _write_folder(files, output)
    except OSError as error:
        raise InputOutputError(
            f"--output: cannot write {output}: {error.strerror or error}", "Free some space, or choose another folder."
        ) from error


def _write_archive(files: Sequence[ContextFile], output: Path) -> Written:
    with _draft(output) as draft:
        with draft.open("wb") as raw:
            if output.suffix == ".tar":
                _tar(files, raw)
            else:
                # Wheels are compressed already: more effort would save next to nothing of a gigabyte.
                level = 1 if any(isinstance(file.data, Path) for file in files) else 9
                with gzip.GzipFile(filename="", mode="wb", compresslevel=level, fileobj=raw, mtime=0) as packed:
                    _tar(files, packed)
        draft.chmod(0o666 & ~_umask())
        with draft.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        size = draft.stat().st_size
        draft.replace(output)
    return Written(output, size, digest)


def _tar(files: Sequence[ContextFile], stream: IO[bytes] | gzip.GzipFile) -> None:
    folders = sorted({file.path.rpartition("/")[0] for file in files if "/" in file.path})
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        entries: list[tuple[str, ContextFile | None]] = [(folder, None) for folder in folders]
        entries += [(file.path, file) for file in files]
        for path, file in sorted(entries, key=lambda entry: entry[0]):
            entry = tarfile.TarInfo(path)
            entry.mtime = MTIME
            if file is None:
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(entry)
            else:
                entry.size, entry.mode = file.size, file.mode
                with file.open() as data:
                    archive.addfile(entry, data)


def _write_folder(files: Sequence[ContextFile], output: Path) -> Written:
    draft = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    try:
        fresh = draft / "new"
        for file in files:
            path = fresh / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            with file.open() as data, path.open("wb") as written:
                shutil.copyfileobj(data, written)
            path.chmod(file.mode)
        if output.exists():
            output.rename(draft / "old")
        fresh.rename(output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Written(output, sum(file.size for file in files), None)


@contextlib.contextmanager
def _draft(output: Path) -> Iterator[Path]:
    """A temporary file beside `output`, removed unless it was renamed."""
    descriptor, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.absolute().parent)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_ours(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        return (folder / "Dockerfile").read_text(encoding="utf-8").startswith(dockerfile.MARK)
    except (OSError, ValueError):
        return False


def _shipped(name: str) -> str:
    return resources.files("vllm_dropin.environment").joinpath("files", name).read_text(encoding="utf-8")


def _readme(image: Image, command: str, wheel_name: str, wheelhouse: bool) -> str:
    row = "| `wheels/` | every wheel that is installed: the image is built without an index |\n" if wheelhouse else ""
    return _shipped("README.md").format(
        name=image.name,
        version=__version__,
        vllm=image.vllm,
        python=image.python,
        base=image.base,
        command=command,
        repository="vllm-dropin",
        tag=image.tag,
        gpus=" --gpus all" if image.variant == "gpu" else "",
        wheel=wheel_name,
        wheelhouse=row,
    )
