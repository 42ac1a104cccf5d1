from pathlib import Path

import pytest

from tests.folders import README_ENGINE_CONFIG, README_METADATA, make_folder
from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.folder import read_folder


def test_an_empty_folder_is_a_model_folder(tmp_path: Path) -> None:
    folder = read_folder(tmp_path)
    assert (folder.metadata, folder.engine_config, folder.hook, folder.find_weights()) == (None, None, None, None)
    assert folder.warnings == ()


def test_a_published_folder_is_read_whole(tmp_path: Path) -> None:
    files = {
        "model-metadata.yaml": README_METADATA,
        "engine_config.json": README_ENGINE_CONFIG,
        "custom.py": "def load_model(code_dir): pass\n",
        "vllm/config.json": "{}",
    }
    folder = read_folder(make_folder(tmp_path, files))
    assert folder.metadata is not None
    assert folder.metadata_data is not None
    assert folder.metadata_data["targetType"] == "textgeneration"
    assert folder.engine_config is not None
    assert folder.hook is not None
    assert folder.find_weights() == tmp_path / "vllm"


def test_weights_are_looked_up_each_time(tmp_path: Path) -> None:
    folder = read_folder(make_folder(tmp_path, {"vllm/.gitkeep": ""}))
    assert folder.find_weights() is None
    make_folder(tmp_path, {"vllm/model.safetensors": "x"})
    assert folder.find_weights() == tmp_path / "vllm"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("custom_flask.py", "not Flask"),
        ("moderation_config.yaml", "guards are not applied"),
        ("custom.py", "neither load_model nor init"),
        ("model-metadata.yml", "has to be model-metadata.yaml"),
    ],
)
def test_files_that_have_no_effect_are_warned_of(tmp_path: Path, name: str, words: str) -> None:
    folder = read_folder(make_folder(tmp_path, {name: ""}))
    assert len(folder.warnings) == 1
    assert name in folder.warnings[0]
    assert words in folder.warnings[0]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="is not a folder"):
        read_folder(tmp_path / "file")
    with pytest.raises(ConfigurationError, match="can't be read"):
        read_folder(tmp_path / ("x" * 300))
