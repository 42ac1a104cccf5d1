from __future__ import annotations

from soak.growth import FEWEST, WARM_UP, lives
from soak.sampler import MEMORY_EVERY, Process

MEGABYTE = 1_000_000


def life(pid: int, seconds: float, grows: float = 0.0, begin: float = 100.0, role: str = "worker 0") -> list[Process]:
    """Samples of a process of 50 MB, which warms up by 40 MB, and then grows by so many bytes a second."""
    count = int(seconds / MEMORY_EVERY) + 1
    ages = [index * MEMORY_EVERY for index in range(count)]
    return [
        Process(
            begin + age,
            pid,
            role,
            round(50 * MEGABYTE + min(age / WARM_UP, 1.0) * 40 * MEGABYTE + max(0.0, age - WARM_UP) * grows),
            30,
            4,
        )
        for age in ages
    ]


def test_the_warm_up_is_no_growth() -> None:
    (found,) = lives(life(1, 1200))
    assert (found.memory, found.descriptors, found.threads) == (0, 0, 0)
    assert found.memory_first == found.memory_last == found.memory_peak == 90 * MEGABYTE


def test_growth_after_the_warm_up() -> None:
    (found,) = lives(life(1, WARM_UP + 1000, grows=50_000))
    assert found.memory is not None
    assert 40 * MEGABYTE < found.memory < 50 * MEGABYTE  # 50 MB, from tenth to tenth


def test_a_peak_in_between_is_no_growth() -> None:
    samples = life(1, 1200)
    samples[100] = Process(samples[100].at, 1, "worker 0", 900 * MEGABYTE, 900, 90)
    (found,) = lives(samples)
    assert (found.memory, found.descriptors, found.threads) == (0, 0, 0)
    assert found.memory_peak == 900 * MEGABYTE


def test_each_process_has_a_life_of_its_own() -> None:
    """A worker that was killed has a successor, whose smaller size must not hide the growth of the first."""
    found = lives([*life(1, 1000, grows=60_000), *life(2, 1000, begin=1200.0), *life(3, 1000, role="supervisor")])
    assert [(one.role, one.pid) for one in found] == [("supervisor", 3), ("worker 0", 1), ("worker 0", 2)]
    growths = [one.memory for one in found]
    assert growths[0] == growths[2] == 0
    assert growths[1] is not None
    assert growths[1] > 40 * MEGABYTE


def test_a_short_life_is_not_judged() -> None:
    (found,) = lives(life(1, WARM_UP + MEMORY_EVERY * (FEWEST - 2), grows=1e6))
    assert found.memory is None
