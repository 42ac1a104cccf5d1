"""Flag lists against vLLM's own parser: the same are taken, and what is passed on means to vLLM what was written."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.report import count, tries
from vllm_dropin.engine import flags, interpreter
from vllm_dropin.engine.flags import FlagSpec, FlagTable
from vllm_dropin.errors import FlagError
from vllm_dropin.settings.engine_flags import claims, merge

ORACLE = Path(__file__).with_name("flag_oracle.py")
CHILDREN = Path(flags.__file__).parent.parent / "children"
TABLE = FlagTable.load("0.32.0")
# `--config` names a file, which is unfolded before vLLM sees it, and `--middleware` is refused whatever its value is.
SPECS = [spec for spec in TABLE.specs if spec.options and spec.dest not in {"config", "middleware"}]
USABLE = [spec for spec in SPECS if spec.dest != "help"]
KNOWN = [option for spec in SPECS for option in spec.options]
TAKE_KEYS = frozenset({"json", "parse_dataclass", "union_dict_and_str"})

# What vLLM takes and the user cannot have meant: ours refuses it, in these words (docs/runtime-parameters.md).
REFUSED_BY_US = re.compile(
    r"after --?[\w-]+ in .*\n.* vLLM would take"  # --enforce-eager true: a model named true
    r"|and its value in one argument|negative fraction|takes no keys|prints help"
    r"|ignores the config file|ambiguous flag -- in"  # --.x 1: a model named {"x": 1}
)
# Kinds of values that ours reads as vLLM does; others, and what is inside JSON, it leaves to vLLM to judge.
READ_BY_US = frozenset({"str", "int", "float", "json", "human_readable_int", "human_readable_int_or_auto"})
LEFT_TO_VLLM = re.compile(
    r".*validation error|Invalid (JSON format|fields) for --lora-modules"
    r"|argument --mm-processor-device: invalid choice"  # its choices are made for the hardware of the machine
)

WORDS = ("x", "org/model", "a b", "4096", "-1", "-0.5", "1k", "2K", "1.5K", "1.5", "auto", "true", "False", "", "None",
         "{}", "[1, 2]", '{"a": 1}', '{"a": 80g}', "a=b", "-x", "-", "é", "1_000", " 7 ", "nan", "٣")  # fmt: skip
GOOD = {
    "int": ("0", "7", "-1", "1_000", " 5 "),
    "float": ("0.5", "1", "1e-3", "-2", "inf"),
    "human_readable_int": ("4096", "4k", "4K", "25.6k", " 2m "),
    "human_readable_int_or_auto": ("4096", "auto", "-1", "AUTO", "8k"),
    "json": ("{}", '{"a": 1}', "[]", "null", "3"),
    "parse_dataclass": ("{}",),
    "union_dict_and_str": ("{}", "x"),
}
KEYS = st.sampled_from(["a", "mode", "b_c", "a.b", "a+", "pass_config.fuse_x", "level"])
JUNK = st.one_of(
    st.sampled_from(["--nope", "-zz", "--max-model-lenn=1", "-tp2", "-O2", "-O=1", "-O", "--help", "-h", "-1.5"]),
    st.sampled_from([*WORDS, "--", "--=", "---", "--a.b", "-.5", "--.x", "-cc", "--no-", "--enforce-eager true"]),
    st.from_regex(r"\A-{0,3}[a-z_.=+ 0-9-]{0,10}\Z"),
    st.sampled_from([5, 0.5, -1, True, False]),
)


def kind_of(spec: FlagSpec) -> str:
    return (spec.type or "str").removeprefix("optional(").rstrip(")")


@st.composite
def spellings(draw: st.DrawFn, spec: FlagSpec, wild: bool) -> str:
    """One of the flag's names, perhaps cut short, perhaps with underscores."""
    option = draw(st.sampled_from(spec.options))
    if not option.startswith("--"):
        return option
    if draw(st.integers(0, 4)) == 0:
        unique = [
            size for size in range(3, len(option)) if sum(known.startswith(option[:size]) for known in KNOWN) == 1
        ]
        option = option[: draw(st.integers(3, len(option)) if wild else st.sampled_from(unique or [len(option)]))]
    if draw(st.integers(0, 2)) == 0:
        option = "--" + option[2:].replace("-", "_")
    return option


def values(spec: FlagSpec, wild: bool) -> st.SearchStrategy[str]:
    """Values that suit the flag, or any."""
    kept = [str(choice) for choice in spec.choices if choice is not None]
    suits = st.sampled_from(kept or GOOD.get(kind_of(spec), ("x", "org/model", "7")))
    return st.one_of(suits, st.sampled_from(WORDS), st.text(max_size=6)) if wild else suits


@st.composite
def uses(draw: st.DrawFn, spec: FlagSpec, wild: bool) -> list[object]:
    """The words of one use of a flag."""
    option = draw(spellings(spec, wild))
    form = draw(st.integers(0, 15))
    if form == 0 and (wild or kind_of(spec) in TAKE_KEYS):
        key, value = draw(KEYS), draw(st.sampled_from(["1", "word", "2k", "[1]", "true", "-1", "a,b", "--x", "null"]))
        return [f"{option}.{key}={value}"] if draw(st.booleans()) else [f"{option}.{key}", value]
    if spec.boolean:
        return [f"{option}={draw(st.sampled_from(['true', 'false', '', '1']))}" if form == 1 and wild else option]
    if form == 1 and (wild or spec.nargs in ("?", "*")):
        return [option]
    if form < 6:
        return [f"{option}={draw(values(spec, wild))}"]
    if form == 6 and not option.startswith("--") and (wild or len(option) == 2):
        return [option + draw(values(spec, wild))]
    most = 1 if spec.nargs in (None, "?") else 3
    return [option, *draw(st.lists(values(spec, wild), min_size=1, max_size=most))]


@st.composite
def flag_lists(draw: st.DrawFn) -> list[object]:
    """A few flags, each perhaps several times, with a model or without; a third of the lists have anything in them."""
    wild = draw(st.integers(0, 2)) == 0
    few = draw(st.lists(st.sampled_from(SPECS if wild else USABLE), min_size=1, max_size=4))
    groups: list[list[object]] = [draw(uses(spec, wild)) for spec in draw(st.lists(st.sampled_from(few), max_size=6))]
    place = draw(st.sampled_from([None, 0, len(groups)] if wild else [None, 0]))
    if place is not None:
        groups.insert(place, ["org/model"])
    if wild and draw(st.booleans()):
        groups.insert(draw(st.integers(0, len(groups))), [draw(JUNK)])
    return [word for group in groups for word in group]


def left_to_vllm(error: str) -> bool:
    """Whether what vLLM says is about a value that ours lets pass unread."""
    named = re.match(r"argument (-[^/:]*)", error)
    spec = TABLE._options.get(named[1]) if named else None
    return bool(LEFT_TO_VLLM.match(error)) or (spec is not None and kind_of(spec) not in READ_BY_US)


class Oracle:
    """vLLM's parser in a process of its own, asked one list at a time."""

    def __init__(self, python: interpreter.EnginePython) -> None:
        environ = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        self.process = subprocess.Popen(
            [python.path, ORACLE, CHILDREN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            cwd="/",
            env=environ,
        )

    def parse(self, args: list[str]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(args) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        with self.process:
            self.process.kill()


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    if not os.environ.get(interpreter.VARIABLE):
        pytest.skip(f"{interpreter.VARIABLE} is not set")
    python = interpreter.find(None, os.environ)
    if FlagTable.load(python.version) != TABLE:
        pytest.skip(f"the engine is vLLM {python.version}")
    asked = Oracle(python)
    yield asked
    asked.close()


def text(arg: object) -> str:
    """A word of engine_config.json as it goes to vLLM."""
    return str(arg).lower() if isinstance(arg, bool) else str(arg)


def passed_on(args: list[object]) -> list[str]:
    """The command line that the product makes of a list. Raises FlagError."""
    parsed = TABLE.parse(args, "test")
    planned, _ = merge([claims(parsed, "test")])
    return [*parsed.positionals, *(token for flag in planned for token in flag.tokens)]


@pytest.mark.e2e
@pytest.mark.slow  # six seconds until vLLM's parser can be asked; tests/engine asks it in `make test`
def test_flag_lists_mean_what_they_mean_to_vllm(oracle: Oracle) -> None:
    subject = "flag lists against vLLM's parser"

    @tries(few=300, times=2)
    @given(flag_lists())
    def agrees(args: list[object]) -> None:
        theirs = oracle.parse([text(arg) for arg in args])
        try:
            ours = passed_on(args)
        except FlagError as error:
            if "error" in theirs:
                count(subject, "refused by both")
            else:
                assert REFUSED_BY_US.search(str(error)), f"vLLM takes {args}, ours says: {error}"
                count(subject, "refused by us, as documented")
            return
        if "error" in theirs:
            assert left_to_vllm(theirs["error"]), f"ours takes {args}, vLLM says: {theirs['error']}"
            count(subject, "left to vLLM, which refuses it")
            return
        again = oracle.parse(ours)
        assert again == theirs, f"{args} is passed on as {ours}"
        count(subject, "the same namespace")

    agrees()


@tries(few=300, times=2)
@given(st.lists(st.one_of(st.text(max_size=12), st.sampled_from(WORDS), JUNK, st.none(), st.floats()), max_size=6))
def test_any_words_are_read_or_refused(args: list[object]) -> None:
    try:
        parsed = TABLE.parse(args, "test")
    except FlagError as error:
        assert "test" in str(error)
        count("any words as flags", "refused")
        return
    assert len(parsed.positionals) <= 1
    assert [*sorted(use.index for use in parsed.uses)] == [use.index for use in parsed.uses]
    count("any words as flags", "read")
