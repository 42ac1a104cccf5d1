import pytest

from vllm_dropin.supervisor.restarts import STABLE_AFTER, RestartBudget


def delays(budget: RestartBudget, times, ready_for=1.0):
    return [budget.next_delay(now, ready_for) for now in times]


def test_each_restart_waits_longer_up_to_the_limit():
    found = delays(RestartBudget(limit=8, max_backoff=10), range(8))
    for delay, expected in zip(found, [0.5, 1, 2, 4, 8, 10, 10, 10], strict=True):
        assert expected <= delay <= expected * 1.1


def test_the_budget_is_spent_within_a_window():
    budget = RestartBudget(limit=3, window=100)
    assert None not in delays(budget, (0, 1, 2))
    assert budget.next_delay(50, 1.0) is None


def test_the_budget_comes_back_when_the_window_has_passed():
    budget = RestartBudget(limit=3, window=100)
    delays(budget, (0, 1, 2))
    assert budget.next_delay(101.5, 1.0) is not None
    assert budget.used == 2


def test_a_stable_engine_begins_with_the_shortest_wait_again():
    budget = RestartBudget(limit=100)
    delays(budget, range(6))
    assert budget.next_delay(10, STABLE_AFTER) == pytest.approx(0.525, abs=0.03)


def test_no_restarts_allowed():
    assert RestartBudget(limit=0).next_delay(0, 1.0) is None
