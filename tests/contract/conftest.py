"""Which product the suite meets, and how.

    CONTRACT_DRIVER    ours (default) or incumbent
    CONTRACT_DRUM      the incumbent's `drum` script, for CONTRACT_DRIVER=incumbent
    CONTRACT_ENGINE    an interpreter with the real engine; the e2e tests need it
    CONTRACT_MODEL     a model folder for the real engine (weights in vllm/)
    CONTRACT_BASE_URL  a service that is already running, in front of any model: only the tests that need no hand on the
                       product or its engine run

What each test asks is the first paragraph of its docstring; scripts/check_contract.py prints it beside the outcomes.
"""

from __future__ import annotations

import inspect
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.contract.drivers import Driver, Engine, Incumbent, Ours, Service, envelopes, start
from tests.contract.folders import make_folder

READY = 40.0  # seconds to readiness with the stub; the incumbent alone imports for 6
Start = Callable[..., Service]


@pytest.fixture(autouse=True, scope="session")
def terminable() -> Iterator[None]:
    """Let SIGTERM end the session in order: products that a test has started are stopped, not left behind."""

    def leave(*_: object) -> None:
        pytest.exit("terminated", returncode=143)

    before = signal.signal(signal.SIGTERM, leave)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def described(request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]) -> None:
    """Put the question into the report, for the table."""
    record_property("asks", " ".join((inspect.getdoc(request.function) or "").split("\n\n")[0].split()))


@pytest.fixture(scope="session")
def driver() -> Driver:
    if os.environ.get("CONTRACT_BASE_URL"):
        pytest.skip("a service by URL: nothing can be started")
    if os.environ.get("CONTRACT_DRIVER", "ours") == "ours":
        return Ours()
    return Incumbent(Path(os.environ["CONTRACT_DRUM"]))


@pytest.fixture
def launch(driver: Driver, tmp_path: Path) -> Iterator[Start]:
    """Start the product on a folder of the test's making: `launch(args=…, parameters=…, environ=…, ready=True)`."""
    started: list[Service] = []
    numbers = itertools.count()

    def begin(
        *,
        ready: bool = False,
        parameters: Mapping[str, tuple[str, Any]] | None = None,
        environ: Mapping[str, str] | None = None,
        load_seconds: float = 0,
        target_type: str = "textgeneration",
        **folder: Any,
    ) -> Service:
        scratch = tmp_path / str(next(numbers))
        scratch.mkdir()
        engine = Engine.stub(scratch / "engine", load_seconds)
        variables = {**envelopes(parameters or {}), **(environ or {})}
        model = make_folder(scratch / "model", target_type=target_type, **folder)
        service = start(driver, model, engine, scratch, variables, target_type)
        started.append(service)
        return service.wait_ready(READY) if ready else service

    yield begin
    for service in started:
        service.stop()


@pytest.fixture(scope="session")
def controlled(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One ready service over the stub engine, shared: tests may look at the engine's record, but change nothing."""
    scratch = tmp_path_factory.mktemp("controlled")
    service = start(driver, make_folder(scratch / "model"), Engine.stub(scratch / "engine"), scratch)
    try:
        yield service.wait_ready(READY)
    finally:
        service.stop()


@pytest.fixture(scope="session", params=["stub", pytest.param("real", marks=pytest.mark.e2e)])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """A ready service: the one at CONTRACT_BASE_URL, or ours to start, over the stub and then over the real engine."""
    if url := os.environ.get("CONTRACT_BASE_URL"):
        if request.param == "real":
            pytest.skip("one service is enough")
        yield Service(url.rstrip("/"))
    elif request.param == "stub":
        yield request.getfixturevalue("controlled")
    else:
        yield from on_the_real_engine(request)


def on_the_real_engine(request: pytest.FixtureRequest) -> Iterator[Service]:
    if "CONTRACT_ENGINE" not in os.environ or "CONTRACT_MODEL" not in os.environ:
        pytest.skip("CONTRACT_ENGINE and CONTRACT_MODEL name the real engine and model")
    scratch = request.getfixturevalue("tmp_path_factory").mktemp("real")
    folder = make_folder(
        scratch / "model", weights=False, args=["--max-model-len", "2048", "--enforce-eager", "--max-num-seqs", "32"]
    )
    (folder / "vllm").symlink_to(Path(os.environ["CONTRACT_MODEL"]).resolve())
    engine = Engine(Path(os.environ["CONTRACT_ENGINE"]))
    # Short answers: the suite asks for shapes, and the model would talk up to its context length.
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", **envelopes({"max_tokens": ("numeric", 8)})}
    service = start(request.getfixturevalue("driver"), folder, engine, scratch, variables)
    try:
        yield service.wait_ready(240)
    finally:
        service.stop()
