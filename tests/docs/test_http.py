"""docs/http.md says what the gateway does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripts import check_contract

from vllm_dropin.gateway import metrics
from vllm_dropin.gateway.access import PUBLIC
from vllm_dropin.gateway.app import create_app
from vllm_dropin.gateway.config import GatewayConfig, Limits
from vllm_dropin.gateway.openai import inference_methods
from vllm_dropin.gateway.state import SharedState, Status

PAGE = (Path(__file__).parents[2] / "docs" / "http.md").read_text(encoding="utf-8")
DIRECT = {"/directAccess/{path}": {"GET", "POST", "PUT"}, "/nim/{path}": {"GET", "POST", "PUT"}}


def part(title: str) -> str:
    """The text under a heading."""
    return re.split(r"^## ", PAGE.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def cells(title: str) -> list[list[str]]:
    """The rows of the tables under a heading, their heads left out."""
    lines = [line for line in part(title).splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines][1:]


def without_slash(path: str) -> str:
    return path.rstrip("/") or "/"


DOCUMENTED = {
    without_slash(path): (set(methods.split(", ")), key, "(root)" in route)
    for route, methods, key, _ in cells("Routes")
    for path in re.findall(r"`(/[^`]*)`", route)
}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    state = SharedState.create(tmp_path_factory.mktemp("state") / "state", 1)
    return create_app(GatewayConfig(code_dir="/m", engine_uds="/e", served_model="m"), state, 0)


def test_every_route_has_a_row_and_every_row_a_route(app):
    patterns = {path: inference_methods(path.replace("{id}", "resp_1")) for path in DOCUMENTED if "{id}" in path}
    assert len(patterns) == 2
    routes = {path: set(route.methods) - {"HEAD"} for path, route in app.routes.items()}
    assert {path: methods for path, (methods, _, _) in DOCUMENTED.items()} == {**routes, **patterns, **DIRECT}


def test_the_key_column():
    assert {path for path, (_, key, _) in DOCUMENTED.items() if key == "no"} == PUBLIC


def test_the_routes_that_answer_at_the_root(app):
    operations = set(app._root_routes)
    assert {path for path, (_, _, root) in DOCUMENTED.items() if root} == operations


def test_every_metric_has_its_row(tmp_path):
    text = metrics.exposition(SharedState.create(tmp_path / "state", 1), None).decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    meanings = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    rows = {name.strip("`").partition("{")[0]: (kind, meaning) for name, kind, meaning in cells("`/metrics`")}
    assert rows == {name: (kind, meanings[name]) for name, kind in kinds.items()}


def test_every_member_of_status_has_its_row():
    named = {name for row in cells("`/status`") for name in re.findall(r"`(\w+)`", row[0])}
    assert named == {*Status.model_fields, "load", "settings"}


def test_the_default_limits():
    defaults = Limits()
    text = part("Limits")
    for words in (
        f"| {defaults.max_in_flight} | `--max-in-flight` |",
        f"| {defaults.max_queue} | `--max-queue` |",
        f"| {defaults.row_concurrency} | `--row-concurrency` |",
        f"| {defaults.json_body >> 20} MiB | `--json-body-limit` |",
        f"| {defaults.row_body >> 20} MiB | `--row-body-limit` |",
        f"| {defaults.held_bytes >> 20} MiB |",
        f"| {defaults.idle_timeout:g} s |",
        f"| {defaults.request_timeout:g} s | `DRUM_OPENAI_CLIENT_TIMEOUT`, `NIM_DIRECT_ACCESS_REQUEST_TIMEOUT` |",
    ):
        assert words in text


def test_the_links_lead_somewhere():
    headings = re.findall(r"^##+ (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors


def test_the_differences_are_those_of_the_data():
    """Made by `python scripts/check_contract.py --docs`."""
    assert check_contract.with_section(PAGE, check_contract.read_differences()) == PAGE


def test_each_difference_names_tests_that_exist():
    suite = Path(check_contract.DIFFERENCES).parent
    for entry in check_contract.read_differences():
        assert entry.kind in ("better", "different")
        for test in entry.tests:
            module, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}(" in (suite / f"{module}.py").read_text(encoding="utf-8")
