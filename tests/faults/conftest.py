"""Services to be hurt, and the mark `faults` on every test that the table names, wherever it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.drivers import Engine, Service, start
from tests.contract.folders import make_folder
from tests.faults.table import named
from tests.supervisor.test_service import Events, OursWith, events

__all__ = ["Events", "events"]

Serve = Callable[..., Service]
COLLECTED = pytest.StashKey[set[str]]()
"""All tests of this run before any selection, without their parameters."""


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = {item.nodeid.partition("[")[0] for item in items}
    for item in items:
        if named(item.nodeid):
            item.add_marker("faults")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start the product on the stub, perhaps an altered one: `serve(*flags, environ=…, alter=…, **folder)`."""
    started: list[Service] = []

    def begin(
        *flags: str,
        environ: dict[str, str] | None = None,
        alter: Callable[[Engine], Engine] = lambda engine: engine,
        model: Path | None = None,
        **folder: Any,
    ) -> Service:
        scratch = tmp_path / str(len(started))
        scratch.mkdir()
        model = model or make_folder(scratch / "model", **folder)
        engine = alter(Engine.stub(scratch / "engine"))
        started.append(start(OursWith(*flags), model, engine, scratch, environ))
        return started[-1]

    yield begin
    for service in started:
        service.stop()


def wrapped(engine: Engine, before: str) -> Engine:
    """The same stub with code that runs before it, in its process."""
    server = next(engine.python.parents[1].glob("lib/python3.*/site-packages/vllm/entrypoints/openai/api_server.py"))
    server.rename(server.with_name("stub_server.py"))
    after = "import pathlib, runpy\n"
    after += "runpy.run_path(str(pathlib.Path(__file__).with_name('stub_server.py')), run_name='__main__')\n"
    server.write_text(before + after)
    return engine
