import time

import pytest

from vllm_dropin.gateway.state import Phase
from vllm_dropin.supervisor.progress import Cause, Progress, read_progress


@pytest.mark.parametrize(
    ("line", "progress"),
    [
        (
            "Loading safetensors checkpoint shards:  33% Completed | 1/3 [00:00<00:01,  1.9it/s]",
            Progress(Phase.LOADING, "loading weights: 1 of 3 shards", 0.33),
        ),
        (
            "(EngineCore pid=7) INFO 11-23 [gpu_model_runner.py:1] Starting to load model /m ...",
            Progress(Phase.LOADING, "loading weights"),
        ),
        (
            "INFO 11-23 [monitor.py:34] torch.compile took 20.0 s in total",
            Progress(Phase.COMPILING, "compiled"),
        ),
        ("Capturing CUDA graphs (decode, FULL):  10%", Progress(Phase.COMPILING, "capturing CUDA graphs")),
        ("INFO:     Application startup complete.", Progress(None, "HTTP front end ready")),
    ],
)
def test_a_line_that_tells_progress(line, progress):
    assert read_progress(line) == progress


def test_other_lines_tell_nothing():
    assert read_progress("INFO 11-23 12:00:00 [loggers.py:2] Avg prompt throughput: 1.0 tokens/s") is None


def test_the_cause_is_the_root_error_not_its_wrapper():
    cause = Cause()
    for line in (
        "(EngineCore pid=9) ERROR 11-23 12:00:00 [core.py:1] EngineCore failed to start.",
        "(EngineCore pid=9) ERROR 11-23 12:00:00 [core.py:1] ValueError: No available memory for the cache blocks.",
        "(APIServer pid=8) RuntimeError: Engine core initialization failed. See root cause above.",
    ):
        cause.read(line)
    assert cause.line() == "ValueError: No available memory for the cache blocks."


def test_an_argparse_error_is_a_cause():
    cause = Cause()
    cause.read("usage: api_server.py [-h]")
    cause.read("api_server.py: error: unrecognized arguments: --foo")
    assert "unrecognized arguments: --foo" in cause.line()


def test_the_last_line_stands_in_for_an_error():
    cause = Cause()
    assert cause.line() == "the engine said nothing"
    cause.read("INFO 11-23 12:00:00 [x.py:1] going down")
    assert cause.line() == "going down"


def test_an_error_of_long_ago_is_not_why_an_engine_dies_now():
    cause = Cause(recent=0.2)
    cause.read("ERROR 11-23 12:00:00 [serving.py:1] ValueError: a client's regular expression")
    cause.read("INFO 11-23 12:00:01 [x.py:1] going down")
    assert cause.line() == "ValueError: a client's regular expression"
    time.sleep(0.3)
    assert cause.line() == "going down"


def test_a_long_line_costs_no_time():
    """The engine may print a whole prompt, and the supervisor's loop waits for this."""
    cause = Cause()
    begin = time.monotonic()
    for _ in range(20):
        cause.read("a " * 8192)
    assert time.monotonic() - begin < 0.5
