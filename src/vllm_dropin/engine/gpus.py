"""Which GPUs a process may use, as CUDA and NVML tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pynvml  # type: ignore[import-untyped]  # nvidia-ml-py ships no types

from vllm_dropin.errors import ConfigurationError


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine, or a MIG slice of one."""

    uuid: str = ""
    memory: int | None = None
    """Total bytes; None where NVML does not tell."""
    slices: tuple[Gpu, ...] = ()
    """MIG instances. A GPU in MIG mode can be used only through them."""
    mig: bool = False


def visible_gpus(environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """The GPUs that a process of this environment may use.

    CUDA_VISIBLE_DEVICES decides first, as CUDA reads it; without it, all that NVML shows. GPU_COUNT, which platforms
    set for the container, only lowers the count: it may hold one line for every MIG slice, of which a process sees
    one. Raises ConfigurationError when GPU_COUNT is no number.
    """
    gpus = select(_machine(), environ.get("CUDA_VISIBLE_DEVICES"))
    cap = environ.get("GPU_COUNT", "").strip()
    if not cap:
        return gpus
    if not cap.isdecimal():
        raise ConfigurationError(f"GPU_COUNT is {cap!r}, not a whole number", "Unset it or give a number of GPUs.")
    return gpus[: int(cap)]


def count_gpus(environ: Mapping[str, str]) -> int:
    """How many GPUs a process of this environment may use; see `visible_gpus`."""
    return len(visible_gpus(environ))


def select(machine: tuple[Gpu, ...], visible: str | None) -> tuple[Gpu, ...]:
    """Apply CUDA_VISIBLE_DEVICES to a machine's GPUs.

    The list holds indexes, UUIDs or their unique prefixes, and MIG UUIDs; the first entry that names nothing ends
    it, so "-1" hides all. Whatever else is there, a process sees at most one MIG slice. On a machine without NVML
    the list is believed.
    """
    if visible is None:
        whole = tuple(gpu for gpu in machine if not gpu.mig)
        return whole or tuple(part for gpu in machine for part in gpu.slices)[:1]
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in visible.split(",")):
        gpu = _find(machine, entry)
        if gpu is None or gpu in chosen:
            break
        if gpu.mig:
            return (gpu,)
        chosen.append(gpu)
    return tuple(chosen)


def _find(machine: tuple[Gpu, ...], entry: str) -> Gpu | None:
    """The GPU or slice that one entry names. A GPU in MIG mode stands for its first slice."""
    if entry.isdecimal():
        index = int(entry)
        if not machine:
            return Gpu(uuid=str(index))
        gpu = machine[index] if index < len(machine) else None
        return gpu.slices[0] if gpu and gpu.slices else gpu
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    if not machine:
        return Gpu(uuid=entry, mig=entry.startswith("MIG-"))
    everything = [*machine, *(part for gpu in machine for part in gpu.slices)]
    named = [gpu for gpu in everything if gpu.uuid.startswith(entry)]
    if len(named) != 1:
        return None
    return named[0].slices[0] if named[0].slices else named[0]


def _machine() -> tuple[Gpu, ...]:
    """All GPUs that NVML shows; none where there is no NVIDIA driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_describe(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _describe(handle: Any) -> Gpu:
    slices = tuple(Gpu(pynvml.nvmlDeviceGetUUID(part), _memory(part), mig=True) for part in _mig_slices(handle))
    return Gpu(pynvml.nvmlDeviceGetUUID(handle), _memory(handle), slices, mig=bool(slices) or _in_mig_mode(handle))


def _memory(handle: Any) -> int | None:
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError:  # unified-memory parts do not tell
        return None


def _in_mig_mode(handle: Any) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except pynvml.NVMLError:  # a part that knows no MIG
        return False


def _mig_slices(handle: Any) -> Iterator[Any]:
    if not _in_mig_mode(handle):
        return
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            yield pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except pynvml.NVMLError:  # instance numbers have gaps
            continue
