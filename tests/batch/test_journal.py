"""The journal survives what cuts it off: an answer is there whole, or it is asked for again."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dropin.batch.journal import ROWS_PER_PART, Journal
from vllm_dropin.errors import ConfigurationError, InputOutputError
from vllm_dropin.scoring.results import Fault, RowResult

WORK = {"input": "rows.csv", "temperature": 0.7}


def answer(row: int, text: str = "yes") -> RowResult:
    return RowResult(row, 0, (f"{text} {row}",), ("stop",), prompt_tokens=3, completion_tokens=2)


def failed(row: int) -> RowResult:
    return RowResult(row, 0, error="too long", fault=Fault.INPUT)


def test_what_was_added_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "out.partial", WORK)
    odd = RowResult(1, 0, ("first\n", "\ud800 é\0"), ("stop", "length"), prompt_tokens=9, completion_tokens=8)
    whole = RowResult(3, 0, (), (), prompt_tokens=0, reply='{"choices": "ü"}'.encode())
    for result in (odd, answer(0), failed(2), whole):
        journal.add(result)
    journal.close()
    journal = Journal.open(tmp_path / "out.partial", WORK)
    assert [journal.has(row) for row in range(5)] == [True] * 4 + [False]
    assert journal.read_part(0) == [odd, answer(0), failed(2), whole]
    assert next(journal.parts(4)) == [answer(0), odd, failed(2), whole]
    assert (journal.tally.rows, journal.tally.failed, journal.tally.errors) == (4, 1, {"input": 1})
    assert (journal.tally.prompt_tokens, journal.tally.completion_tokens) == (12, 10)
    journal.close()


def test_a_row_is_answered_once(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "out.partial", WORK)
    journal.add(answer(7))
    with pytest.raises(ValueError, match="row 7"):
        journal.add(failed(7))
    journal.close()


def test_whole_parts_are_sealed_and_not_kept_in_memory(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "out.partial", WORK)
    rows = list(range(2 * ROWS_PER_PART + 10))
    random.Random(1).shuffle(rows)
    for row in rows:
        journal.add(answer(row) if row % 3 else failed(row))
    tally = journal.tally
    journal.close()
    assert len((tmp_path / "out.partial" / "sealed").read_bytes().splitlines()) == 2
    journal = Journal.open(tmp_path / "out.partial", WORK)
    assert journal.tally == tally
    assert all(journal.has(row) for row in rows)
    results = [result.index for part in journal.parts(len(rows)) for result in part]
    assert results == sorted(rows)
    unsorted = [result.index for part in journal.parts(len(rows), ordered=False) for result in part]
    assert unsorted != results
    assert sorted(unsorted) == results
    journal.close()


def test_a_lost_seal_costs_nothing(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "out.partial", WORK)
    for row in range(ROWS_PER_PART):
        journal.add(answer(row))
    tally = journal.tally
    journal.close()
    (tmp_path / "out.partial" / "sealed").write_bytes(b"00000000 {tor")
    journal = Journal.open(tmp_path / "out.partial", WORK)
    assert journal.tally == tally
    assert journal.has(ROWS_PER_PART - 1)
    journal.close()


def test_a_torn_end_is_cut_off_wherever_it_was_torn(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    journal = Journal.open(folder, WORK)
    for row in range(3):
        journal.add(answer(row))
    journal.close()
    part = folder / "parts" / "000000"
    content = part.read_bytes()
    second = content.index(b"\n", content.index(b"\n") + 1) + 1
    for end in range(second, len(content)):
        part.write_bytes(content[:end])
        journal = Journal.open(folder, WORK)
        assert [journal.has(row) for row in range(3)] == [True, True, False]
        journal.add(answer(2, "again"))
        assert [result.completions[0] for result in journal.read_part(0)] == ["yes 0", "yes 1", "again 2"]
        journal.close()


def test_a_flipped_byte_costs_its_row_and_those_behind_it(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    journal = Journal.open(folder, WORK)
    for row in range(3):
        journal.add(answer(row))
    journal.close()
    part = folder / "parts" / "000000"
    content = bytearray(part.read_bytes())
    content[content.index(b"yes 1")] ^= 1
    part.write_bytes(content)
    journal = Journal.open(folder, WORK)
    assert [journal.has(row) for row in range(3)] == [True, False, False]
    journal.close()


def test_a_missing_answer_is_never_passed_over(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "out.partial", WORK)
    for row in (0, 2):
        journal.add(answer(row))
    with pytest.raises(InputOutputError, match="2 answers where rows 0 to 2"):
        list(journal.parts(3))
    journal.close()


def test_other_work_is_refused_with_the_difference_named(tmp_path: Path) -> None:
    Journal.open(tmp_path / "out.partial", WORK).close()
    with pytest.raises(ConfigurationError, match=r"temperature: 0\.2, was 0\.7") as caught:
        Journal.open(tmp_path / "out.partial", {**WORK, "temperature": 0.2})
    assert "--restart" in caught.value.remedy
    with pytest.raises(ConfigurationError, match="seed: 1, was nothing"):
        Journal.open(tmp_path / "out.partial", {**WORK, "seed": 1})
    journal = Journal.open(tmp_path / "out.partial", {**WORK, "seed": 1}, restart=True)
    assert not journal.has(0)
    journal.close()


def test_restart_drops_the_answers(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "out.partial", WORK)
    journal.add(answer(0))
    journal.close()
    journal = Journal.open(tmp_path / "out.partial", WORK, restart=True)
    assert not journal.has(0)
    assert journal.tally.rows == 0
    journal.close()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    Journal.open(tmp_path / "out.partial", WORK).close()
    (tmp_path / "out.partial" / "manifest.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match="is damaged"):
        Journal.open(tmp_path / "out.partial", WORK)


def test_two_scorers_do_not_write_one_output(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "out.partial", WORK)
    with pytest.raises(ConfigurationError, match="another scorer"):
        Journal.open(tmp_path / "out.partial", WORK)
    journal.close()
    Journal.open(tmp_path / "out.partial", WORK).close()


def test_a_folder_that_cannot_be_made_is_an_io_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputOutputError, match="file"):
        Journal.open(tmp_path / "file" / "out.partial", WORK)


WRITER = """
import sys
from pathlib import Path
from vllm_dropin.batch.journal import Journal
from vllm_dropin.scoring.results import RowResult
journal = Journal.open(Path(sys.argv[1]), {})
for row in range(int(sys.argv[2]), 100_000):
    journal.add(RowResult(row, 0, ("x" * 50,), ("stop",)))
    print(row, flush=True)
"""


def test_sigkill_loses_nothing_that_was_added(tmp_path: Path) -> None:
    first = 0
    for lines in (1, 50, 400):
        argv = [sys.executable, "-c", WRITER, str(tmp_path / "out.partial"), str(first)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(lines):
                said = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
        journal = Journal.open(tmp_path / "out.partial", {})
        assert all(journal.has(row) for row in range(said + 1))
        first = journal.tally.rows
        journal.close()


FULL = """
import resource, signal, sys
from pathlib import Path
from vllm_dropin.batch.journal import Journal
from vllm_dropin.errors import InputOutputError
from vllm_dropin.scoring.results import RowResult
journal = Journal.open(Path(sys.argv[1]), {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    for row in range(1000):
        journal.add(RowResult(row, 0, ("x" * 50,), ("stop",)))
except InputOutputError as error:
    print(row, error.exit_code)
"""


def test_a_file_that_cannot_grow_is_told_and_keeps_what_it_has(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", FULL, str(tmp_path / "out.partial")]
    said = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    rows = int(said[0])
    assert rows > 50
    assert said[1] == "74"
    journal = Journal.open(tmp_path / "out.partial", {})
    assert journal.tally.rows == rows
    journal.add(answer(rows))
    assert len(journal.read_part(0)) == rows + 1
    journal.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs takes root")
def test_a_full_disk_is_an_io_error_and_the_same_journal_goes_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if done.returncode:
        pytest.skip("no mounting here")
    try:
        (disk / "ballast").write_bytes(b"\0" * 128_000)
        journal = Journal.open(disk / "out.partial", WORK)
        rows = 0
        with pytest.raises(InputOutputError) as caught:
            for rows in range(100_000):
                journal.add(answer(rows))
        assert caught.value.exit_code == 74
        journal.close()
        (disk / "ballast").unlink()
        journal = Journal.open(disk / "out.partial", WORK)
        assert journal.tally.rows == rows
        journal.add(answer(rows))
        journal.sync()
        journal.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_memory_stays_flat(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "out.partial", WORK)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for row in range(20 * ROWS_PER_PART):
        journal.add(answer(row))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    journal.close()
    assert grown < 8192  # KiB
