from pathlib import Path

import pytest

from tests.folders import make_folder
from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.hooks import find_hook


@pytest.mark.parametrize(
    ("source", "has_init", "has_load_model"),
    [
        ("def load_model(code_dir): pass\n", False, True),
        ("def init(**kwargs): pass\ndef load_model(code_dir): pass\n", True, True),
        ("from helpers import load_model\n", False, True),
        ("from helpers import fetch as load_model\n", False, True),
        ("load_model = lambda code_dir: None\n", False, True),
        ("try:\n    import a\nexcept ImportError:\n    def load_model(d): pass\n", False, True),
        ("if True:\n    def init(code_dir): pass\nelse:\n    pass\n", True, False),
        ("class C:\n    def load_model(self): pass\ndef f():\n    def init(): pass\n", False, False),
        ("def score(data, model, **kwargs): return data\n", False, False),
        ("from helpers import *\n", True, True),  # nobody knows without running it
        ("", False, False),
    ],
)
def test_only_what_importing_would_bind_counts(
    tmp_path: Path, source: str, has_init: bool, has_load_model: bool
) -> None:
    hook = find_hook(make_folder(tmp_path, {"custom.py": source}))
    assert hook is not None
    assert (hook.has_init, hook.has_load_model) == (has_init, has_load_model)
    assert hook.runs == (has_init or has_load_model)


def test_it_is_found_below_the_folder(tmp_path: Path) -> None:
    hook = find_hook(make_folder(tmp_path, {"code/deep/custom.py": "def load_model(d): pass\n"}))
    assert hook is not None
    assert hook.file == tmp_path / "code/deep/custom.py"


def test_weights_and_hidden_folders_are_not_searched(tmp_path: Path) -> None:
    files = {".git/custom.py": "", "vllm/custom.py": "", "a/.venv/custom.py": "", "__pycache__/custom.py": ""}
    assert find_hook(make_folder(tmp_path, files)) is None


def test_several_are_an_error_that_lists_them(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"custom.py": "", "b/custom.py": "", "a/vllm/custom.py": ""})
    with pytest.raises(ConfigurationError, match=r"3 files .*a/vllm/custom.py, b/custom.py, custom.py"):
        find_hook(folder)


@pytest.mark.parametrize("source", ["def load_model(:\n", "\n\nif True:\nx = 1\n", "a = '\n"])
def test_a_syntax_error_names_the_line(tmp_path: Path, source: str) -> None:
    with pytest.raises(ConfigurationError, match=r"custom.py, line \d"):
        find_hook(make_folder(tmp_path, {"custom.py": source}))


def test_a_file_that_is_no_text_has_no_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"custom.py: .*null bytes"):
        find_hook(make_folder(tmp_path, {"custom.py": b"x = 1\0"}))


def test_the_file_is_never_run(tmp_path: Path) -> None:
    source = f"open({str(tmp_path / 'ran')!r}, 'w')\ndef load_model(d): pass\n"
    assert find_hook(make_folder(tmp_path, {"custom.py": source})) is not None
    assert not (tmp_path / "ran").exists()
