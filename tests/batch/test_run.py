"""Whole runs of `vllm-dropin score`: what it writes, and that nothing on the way loses or doubles a row."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.batch.conftest import Scoring
from tests.conftest import wait_until
from vllm_dropin.batch.pace import GRAPHS


def answered(folder: Path) -> int:
    """Lines in a journal's open parts: rows that have been answered, not counting sealed parts."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("out.csv.partial/parts/*"))


def test_every_row_has_its_answer_beside_its_own_columns(quick: Scoring) -> None:
    quick.write_csv("rows.csv", (f"question {place}" for place in range(300)))
    summary = quick.summary("rows.csv", "-o", "out.csv")
    rows = quick.read_csv("out.csv")
    assert [row["key"] for row in rows] == [f"k{place}" for place in range(300)]
    assert [row["row_id"] for row in rows] == [str(place) for place in range(300)]
    assert all(row["completion"] == f"question {place} question {place} question" for place, row in enumerate(rows))
    assert {row["finish_reason"] for row in rows} == {"stop"}
    assert (summary["rows"], summary["errors"], summary["completion_tokens"]) == (300, {}, 1500)
    assert not list(quick.folder.glob("out.csv.*"))


def test_what_a_request_says(quick: Scoring) -> None:
    (quick.folder / "ask.j2").write_text("{% block system %}Be {{ tone }}.{% endblock %}About {{ topic }}?")
    (quick.folder / "rows.jsonl").write_text('{"tone": "kind", "topic": "unique-7f3a", "seed": 5}\n')
    schema = {"type": "object", "properties": {"answer": {"type": "string"}}}
    (quick.folder / "schema.json").write_text(json.dumps(schema))
    options = ("--template", "ask.j2", "--params", "temperature=0.5", "--row-params", "seed")
    quick.run("rows.jsonl", "-o", "out.jsonl", *options, "--response-format", "schema.json")
    (sent,) = (request for request in quick.engine.requests() if "unique-7f3a" in request["body"])
    body = json.loads(sent["body"])
    assert body["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "About unique-7f3a?"},
    ]
    assert (body["model"], body["temperature"], body["seed"]) == ("fake", 0.5, 5)
    assert body["response_format"]["json_schema"]["schema"] == schema


def test_a_key_of_the_environment_goes_to_the_server(quick: Scoring, monkeypatch: pytest.MonkeyPatch) -> None:
    quick.write_csv("rows.csv", ["with a key 91c2"])
    done = subprocess.run(
        quick.command("rows.csv", "-o", "out.csv"),
        cwd=quick.folder,
        env={**quick.environ, "OPENAI_API_KEY": "sk-secret-1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    (sent,) = (request for request in quick.engine.requests() if "91c2" in request["body"])
    assert sent["headers"]["authorization"] == "Bearer sk-secret-1"
    assert "sk-secret" not in done.stdout + done.stderr


def test_from_standard_input_to_standard_output(quick: Scoring) -> None:
    given = "".join(json.dumps({"promptText": f"row {place}", "own": place}) + "\n" for place in range(50))
    done = quick.run("-", "--format", "jsonl", "-o", "-", given=given)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["own"] for record in records] == list(range(50))
    assert records[7]["completion"] == "row 7 row 7 row"
    unordered = quick.run("-", "--format", "jsonl", "-o", "-", "--unordered", given=given)
    assert sorted(map(json.loads, unordered.stdout.splitlines()), key=lambda record: record["row_id"]) == records


@pytest.mark.parametrize("points", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_sigkill_at_random_points_loses_and_doubles_nothing(scoring: Scoring, points: int) -> None:
    """Each run is killed somewhere between its start and its end, then the same command goes on."""
    scoring.write_csv("rows.csv", (f"question {place} tokens={place % 9 + 1}" for place in range(5000)))
    scoring.run("rows.csv", "-o", "undisturbed.csv")
    expected = (scoring.folder / "undisturbed.csv").read_bytes()
    chance = random.Random(20261124)
    kills = finished = 0
    while kills < points or not finished:
        output = scoring.folder / "out.csv"
        before = answered(scoring.folder)
        process = scoring.start("rows.csv", "-o", "out.csv", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and answered(scoring.folder) == before:
            time.sleep(0.005)
        if kills < points:
            time.sleep(chance.uniform(0, 0.15))
            process.kill()
            kills += process.wait(10) == -signal.SIGKILL
        assert process.wait(60) in (0, -signal.SIGKILL)
        if output.exists():
            assert output.read_bytes() == expected
            output.unlink()
            finished += 1
    # Killed runs had up to 4,096 rows in flight; what they had finished was not asked again.
    assert scoring.engine.stats()["started"] < 5000 * (finished + 1) + points * 4096


def test_broken_rows_of_ten_kinds_fail_and_no_others(scoring: Scoring) -> None:
    """5% of 1,000 rows are broken in ten ways."""
    broken = {
        "the prompt is empty": {"promptText": ""},
        "blank": {"promptText": " \n\t"},
        "no prompt": {"other": 1},
        "a list": {"promptText": ["a", "b"]},
        "not JSON": '{"promptText": "cut',
        "not an object": "[1, 2]",
        "temperature": {"promptText": "p", "temperature": "hot"},
        "max_tokens": {"promptText": "p", "max_tokens": 0},
        "status 400": {"promptText": "status=400 please"},
        "status 413": {"promptText": "status=413 please"},
    }
    lines: list[str] = []
    wrong: dict[int, str] = {}
    kinds = list(broken)
    for place in range(1000):
        record: object = {"promptText": f"fine {place}"}
        if place % 20 == 7:
            wrong[place] = kinds[place // 20 % 10]
            record = broken[wrong[place]]
        lines.append(record if isinstance(record, str) else json.dumps(record))
    (scoring.folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    summary = scoring.summary("rows.jsonl", "-o", "out.jsonl", "--row-params", "temperature,max_tokens")
    records = [json.loads(line) for line in (scoring.folder / "out.jsonl").read_text().splitlines()]
    assert [record["row_id"] for record in records] == list(range(1000))
    assert {record["row_id"] for record in records if record["error"]} == set(wrong)
    assert Counter(wrong.values()) == dict.fromkeys(kinds, 5)
    by_kind = {wrong[record["row_id"]]: record["error"] for record in records if record["error"]}
    assert len(set(by_kind.values())) >= 9  # an empty and a blank prompt are one thing
    assert "temperature" in by_kind["temperature"] and "max_tokens" in by_kind["max_tokens"]
    assert "400" in by_kind["status 400"] and "413" in by_kind["status 413"]
    assert all(record["completion"] is None for record in records if record["error"])
    assert summary["errors"] == {"input": 50}


@pytest.mark.parametrize(("limit", "enough"), [("3", "4"), ("2%", "5%")])
def test_too_many_errors_stop_early_and_keep_everything(scoring: Scoring, limit: str, enough: str) -> None:
    prompts = (("status=400 " if place % 25 == 3 else "fine ") + str(place) for place in range(100))
    scoring.write_csv("rows.csv", [*prompts, *(f"later {place}" for place in range(20))])
    words = ("rows.csv", "-o", "out.csv", "--concurrency", "16", "--max-errors")
    done = scoring.run(*words, limit, code=65)
    assert "rows failed" in done.stderr and "--max-errors" in done.stderr
    assert not (scoring.folder / "out.csv").exists()
    kept = answered(scoring.folder)
    assert kept > 0
    scoring.run(*words, enough)
    assert sum(bool(row["error"]) for row in scoring.read_csv("out.csv")) == 4
    assert scoring.engine.stats()["finished"] <= 120 + 16


def test_changed_input_and_parameters_are_refused(scoring: Scoring) -> None:
    scoring.write_csv("rows.csv", [*("fine" for _ in range(50)), "status=400"])
    scoring.run("rows.csv", "-o", "out.csv", "--max-errors", "0", code=65)
    changed = scoring.run("rows.csv", "-o", "out.csv", "--params", "top_p=0.3", code=78)
    assert "top_p: 0.3, was nothing" in changed.stderr
    scoring.write_csv("rows.csv", [*("fine" for _ in range(50)), "status=401"])
    changed = scoring.run("rows.csv", "-o", "out.csv", code=78)
    assert "input 1: rows.csv" in changed.stderr and "--restart" in changed.stderr
    scoring.run("rows.csv", "-o", "out.csv", "--restart")
    assert len(scoring.read_csv("out.csv")) == 51


def test_an_output_among_the_inputs_is_no_input(quick: Scoring) -> None:
    """A second run over a folder finds the first one's output there."""
    (quick.folder / "data").mkdir()
    quick.write_csv("data/rows.csv", ["one", "two"])
    for words in (("data",), ("data", "--restart"), ("data/*.csv", "--restart"), ("data/**/*", "--restart")):
        assert quick.summary(*words, "-o", "data/out.csv", "--format", "csv")["rows"] == 2
    done = quick.run("data/out.csv", "-o", "./data/../data/out.csv", "--restart", code=78)
    assert "data/out.csv is both input and output" in done.stderr


def test_an_output_that_exists_is_not_overwritten(quick: Scoring) -> None:
    quick.write_csv("rows.csv", ["a"])
    (quick.folder / "out.csv").write_text("precious")
    assert "exists" in quick.run("rows.csv", "-o", "out.csv", code=78).stderr
    assert (quick.folder / "out.csv").read_text() == "precious"
    quick.run("rows.csv", "-o", "out.csv", "--restart")
    assert len(quick.read_csv("out.csv")) == 1


def test_a_server_that_is_away_for_a_while_costs_no_row(scoring: Scoring) -> None:
    scoring.write_csv("rows.csv", (f"delay=0.05 row {place}" for place in range(600)))
    process = scoring.start("rows.csv", "-o", "out.csv")
    wait_until(lambda: answered(scoring.folder) > 50, 20)
    scoring.engine.stop()
    time.sleep(1.5)
    scoring.engine.start()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    rows = scoring.read_csv("out.csv")
    assert len(rows) == 600
    assert not [row for row in rows if row["error"]]


def test_a_server_that_stays_away_ends_the_run_and_the_same_command_goes_on(scoring: Scoring) -> None:
    scoring.write_csv("rows.csv", (f"delay=0.05 row {place}" for place in range(300)))
    options = ("rows.csv", "-o", "out.csv", "--param", "DRUM_OPENAI_CLIENT_TIMEOUT=3")
    process = scoring.start(*options)
    wait_until(lambda: answered(scoring.folder) > 50, 20)
    scoring.engine.stop()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 74, errors
    assert "the same command" in errors
    kept = answered(scoring.folder)
    scoring.engine.start()
    scoring.run(*options)
    rows = scoring.read_csv("out.csv")
    assert len(rows) == 300
    assert not [row for row in rows if row["error"]]
    assert scoring.engine.stats()["finished"] == 300 - kept


def test_no_server_is_told_at_once(scoring: Scoring) -> None:
    scoring.write_csv("rows.csv", ["a"])
    scoring.engine.stop()
    started = time.monotonic()
    assert "does not answer" in scoring.run("rows.csv", "-o", "out.csv", code=74).stderr
    assert time.monotonic() - started < 10


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs takes root")
@pytest.mark.parametrize(("ballast", "where"), [(440_000, "journal"), (270_000, "output")])
def test_a_full_disk_ends_the_run_with_what_was_answered(scoring: Scoring, ballast: int, where: str) -> None:
    disk = scoring.folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no mounting here")
    try:
        scoring.write_csv("rows.csv", (f"a longer question with the number {place}" for place in range(1500)))
        (disk / "ballast").write_bytes(b"\0" * ballast)
        done = scoring.run("rows.csv", "-o", "disk/out.csv", code=74)
        assert where in done.stderr and "same command" in done.stderr
        assert not (disk / "out.csv").exists()
        kept = sum(path.read_bytes().count(b"\n") for path in disk.glob("out.csv.partial/parts/*"))
        assert kept == 1500 if where == "output" else 100 < kept < 1500
        asked = scoring.engine.stats()["finished"]
        (disk / "ballast").unlink()
        scoring.run("rows.csv", "-o", "disk/out.csv")
        assert len(scoring.read_csv("disk/out.csv")) == 1500
        assert scoring.engine.stats()["finished"] - asked == 1500 - kept
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_journal_may_be_on_another_disk(quick: Scoring) -> None:
    quick.write_csv("rows.csv", ["a", "b"])
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        assert os.stat(memory).st_dev != os.stat(quick.folder).st_dev
        quick.run("rows.csv", "-o", "out.csv", "--journal", f"{memory}/journal")
    assert len(quick.read_csv("out.csv")) == 2
    assert not list(quick.folder.glob("out.csv.*"))


def test_ctrl_c_in_a_terminal_stops_cleanly_and_says_how_to_go_on(scoring: Scoring) -> None:
    scoring.write_csv("rows.csv", (f"delay=0.05 row {place}" for place in range(1500)))
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(scoring.folder)
        argv = scoring.command("rows.csv", "-o", "out.csv")
        os.execve(argv[0], argv, scoring.environ)
    shown = b""

    def read(seconds: float) -> bool:
        nonlocal shown
        while select.select([terminal], [], [], seconds)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # how Linux says that the other end is closed
                return False
        return True

    deadline = time.monotonic() + 30
    while not re.search(rb"\[#+\.*\] +\d+%  [1-9]\d* rows", shown):
        assert read(0.05) and time.monotonic() < deadline, shown.decode()
    os.write(terminal, b"\x03")
    while read(0.5):
        assert time.monotonic() < deadline, shown.decode()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    os.close(terminal)
    text = shown.decode()
    assert "the same command goes on" in text
    assert "Traceback" not in text
    kept = answered(scoring.folder)
    assert 0 < kept < 1500
    assert f"{kept} answered rows are kept" in text.replace(",", "")
    scoring.run("rows.csv", "-o", "out.csv")
    assert len(scoring.read_csv("out.csv")) == 1500
    assert scoring.engine.stats()["finished"] <= 1500 + GRAPHS  # those in flight may have been done by then


def test_sigterm_keeps_what_was_answered(scoring: Scoring) -> None:
    scoring.write_csv("rows.csv", (f"delay=0.05 row {place}" for place in range(500)))
    process = scoring.start("rows.csv", "-o", "out.csv", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: answered(scoring.folder) > 20, 20)
    process.terminate()
    assert process.wait(10) == 143
    assert answered(scoring.folder) > 20
    # What was in flight has been given up, so that the server does not work for nobody.
    wait_until(lambda: scoring.engine.stats()["running"] == 0, 5)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("missing.csv", "-o", "out.csv"), "missing.csv does not exist"),
        (("rows.csv", "-o", "out.xyz"), "names no format"),
        (("rows.csv", "-o", "out.csv", "--prompt-column", "prompt"), "no column 'prompt'"),
        (("rows.csv", "-o", "out.csv", "--columns", "kye"), "no column 'kye'"),
        (("rows.csv", "-o", "out.csv", "--template", "none.j2"), "none.j2"),
        (("rows.csv", "-o", "out.csv", "--params", "temprature=1"), "Did you mean 'temperature'"),
        (("-", "-o", "out.csv"), "--format"),
    ],
)
def test_mistakes_are_told_before_anything_starts(quick: Scoring, words: tuple[str, ...], reason: str) -> None:
    quick.write_csv("rows.csv", ["a"])
    before = quick.engine.stats()["started"]
    done = quick.run(*words, code=78)
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert quick.engine.stats()["started"] == before
    assert not list(quick.folder.glob("out.*"))


@pytest.mark.parametrize("words", [("rows.csv",), ("rows.csv", "-o", "out.csv", "--max-errors", "many")])
def test_usage_errors(quick: Scoring, words: tuple[str, ...]) -> None:
    quick.write_csv("rows.csv", ["a"])
    quick.run(*words, code=2)
