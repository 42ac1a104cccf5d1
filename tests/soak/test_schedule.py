from __future__ import annotations

from itertools import islice

from soak.schedule import GAP, Kind, plan


def test_the_same_seed_gives_the_same_faults() -> None:
    assert list(islice(plan(7), 100)) == list(islice(plan(7), 100))
    assert list(islice(plan(7), 100)) != list(islice(plan(8), 100))


def test_gaps_are_bounded() -> None:
    gaps = [planned.gap for planned in islice(plan(7), 500)]
    assert min(gaps) >= GAP[0]
    assert max(gaps) <= GAP[1]


def test_every_kind_comes_before_any_comes_again() -> None:
    kinds = [planned.kind for planned in islice(plan(7), 4 * len(Kind))]
    for at in range(0, len(kinds), len(Kind)):
        assert set(kinds[at : at + len(Kind)]) == set(Kind)
