"""Which GPUs are visible, on machines written down as data, and on this one."""

import subprocess
import sys

import pytest

from vllm_dropin.engine.gpus import Gpu, count_gpus, select, visible_gpus
from vllm_dropin.errors import ConfigurationError

A, B, C = (Gpu(f"GPU-{letter}1", 80 << 30) for letter in "abc")
SLICES = (Gpu("MIG-1", 10 << 30, mig=True), Gpu("MIG-2", 10 << 30, mig=True))
SLICED = Gpu("GPU-d1", 80 << 30, SLICES, mig=True)


@pytest.mark.parametrize(
    ("machine", "visible", "expected"),
    [
        ((A, B, C), None, (A, B, C)),
        ((), None, ()),
        ((A, B), "", ()),
        ((A, B), "-1", ()),
        ((A, B), "NoDevFiles", ()),
        ((A, B, C), "2,0", (C, A)),
        ((A, B, C), " 0 , 1 ", (A, B)),
        ((A, B), "0,-1,1", (A,)),  # the first that names nothing ends the list
        ((A, B), "0,7,1", (A,)),
        ((A, B), "0,0", (A,)),
        ((A, B), "GPU-b1", (B,)),
        ((A, B), "GPU-b", (B,)),
        ((A, B), "GPU-", ()),  # not unique
        ((A, B), "GPU-x,0", ()),
        ((SLICED,), None, SLICES[:1]),  # a process sees one slice
        ((SLICED,), "0", SLICES[:1]),
        ((SLICED,), "MIG-2", SLICES[1:]),
        ((SLICED,), "MIG-1,MIG-2", SLICES[:1]),
        ((A, SLICED), None, (A,)),
        ((Gpu("GPU-e", 1, mig=True),), None, ()),  # MIG mode without a slice: nothing to use
    ],
)
def test_select(machine: tuple[Gpu, ...], visible: str | None, expected: tuple[Gpu, ...]) -> None:
    assert select(machine, visible) == expected


@pytest.mark.parametrize(
    ("visible", "count"), [("0,1,2,3", 4), ("GPU-a,GPU-b", 2), ("MIG-a,MIG-b", 1), ("", 0), ("-1", 0)]
)
def test_list_is_believed_without_nvml(visible: str, count: int) -> None:
    assert len(select((), visible)) == count


def test_this_machine_agrees_with_the_driver() -> None:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except FileNotFoundError:
        listed = ""
    if "MIG" in listed:
        pytest.skip("a machine in MIG mode is described by the cases above")
    gpus = visible_gpus({})
    assert len(gpus) == sum(line.startswith("GPU ") for line in listed.splitlines())
    assert all(gpu.uuid.startswith("GPU-") for gpu in gpus)


def test_gpu_count_only_lowers() -> None:
    present = count_gpus({"CUDA_VISIBLE_DEVICES": "0"})
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0", "GPU_COUNT": "8"}) == present
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0", "GPU_COUNT": ""}) == present
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0", "GPU_COUNT": "0"}) == 0


def test_gpu_count_must_be_a_number() -> None:
    with pytest.raises(ConfigurationError, match="GPU_COUNT is 'two'"):
        count_gpus({"GPU_COUNT": "two"})


def test_import_needs_no_torch() -> None:
    program = "import sys, vllm_dropin.engine.gpus; assert not {'torch', 'vllm'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=30).returncode == 0
