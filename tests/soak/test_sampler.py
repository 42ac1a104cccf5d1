from __future__ import annotations

import os
import threading

from soak.sampler import OURS, read_gauges, read_process

METRICS = """\
# HELP vllm_dropin_in_flight Requests that the engine is working on.
vllm_dropin_in_flight 3
vllm_dropin_held_bytes 1024
"""
ENGINES = """\
vllm:num_requests_running{engine="0",model_name="m"} 5.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 2.0
"""


def test_gauges_with_and_without_an_engine() -> None:
    both = read_gauges(METRICS + ENGINES, 1.0, 9)
    assert (both.engine, both.open) == (7, 9)
    assert both.ours == {**dict.fromkeys(OURS, 0), "in_flight": 3, "held_bytes": 1024}
    assert read_gauges(METRICS, 1.0, 9).engine is None


def test_a_process_as_it_is() -> None:
    before = read_process(1.0, os.getpid(), "test")
    held = bytearray(os.urandom(1 << 20) * 40)
    with open(os.devnull) as file, open(os.devnull):
        waiting = threading.Event()
        thread = threading.Thread(target=waiting.wait)
        thread.start()
        after = read_process(2.0, os.getpid(), "test")
        waiting.set()
        thread.join()
    assert 35 << 20 < after.memory - before.memory < 80 << 20, len(held)
    assert after.descriptors == before.descriptors + 2
    assert after.threads == before.threads + 1
    assert file.closed
