"""Flags between versions: invented tables for the rules, the shipped ones for what really happened."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_dropin.engine.arguments import FlagSpec
from vllm_dropin.engine.flags import FlagTable
from vllm_dropin.engine.upgrades import Change, Upgrade


def spec(dest: str, *more: str, **fields: Any) -> FlagSpec:
    return FlagSpec(dest, ("--" + dest.replace("_", "-"), *more), **fields)


OLD = FlagTable(
    "1.0.0",
    (
        spec("same", type="int", default=4),
        spec("worked_out", default=None),
        spec("becomes_known", type="int"),
        spec("gone_for_good", type="int", default=1),
        spec("spelled_twice", "--second-spelling", type="int"),
        spec("max_long_words", type="int", default=3),
        spec("kind", choices=("a", "b"), default="a"),
        spec("aging", type="str"),
        spec("flips", "--no-flips", nargs=0, default=False, off=("--no-flips",)),
        spec("many", nargs="+", default=["x", "y"]),
        spec("disable_talk", nargs=0, default=False),
    ),
)
NEW = FlagTable(
    "2.0.0",
    (
        spec("same", type="int", default=4),
        spec("worked_out", default=None),
        spec("becomes_known", type="int", default=7),
        spec("second_spelling", type="int"),
        spec("max_longer_words", type="int", default=3),
        spec("kind", choices=("b", "c"), default="b"),
        spec("aging", type="str", deprecated=True),
        spec("flips", "--no-flips", nargs=0, default=True, off=("--no-flips",)),
        spec("many", nargs="+", default=["z"]),
        spec("brand_new", type="int"),
        spec("enable_talk", "--disable-talk", nargs=0, default=True, off=("--disable-talk",)),
    ),
)
BETWEEN = Upgrade(OLD, NEW)


def changes(upgrade: Upgrade, *args: object) -> list[Change]:
    table, error = upgrade.understand(args, "here")
    assert error is None
    return [change for use in table.parse(args, "here").uses for change in upgrade.changes(use, "here")]


@pytest.mark.parametrize(
    ("args", "kind", "blocking", "words"),
    [
        (("--gone-for-good", 3), "removed", True, ["Remove --gone-for-good and its value from here."]),
        (("--max-long-words", 3), "removed", True, ["--max-longer-words is new, of the same kind"]),
        (("--spelled-twice=3",), "renamed", True, ["Write --second-spelling instead of --spelled-twice"]),
        (("--second-spelling=3",), "renamed", False, ["still takes this spelling"]),
        (("--disable-talk",), "renamed", False, ["it is --enable-talk in vLLM 2.0.0, which still takes"]),
        (("--kind", "a"), "refused", True, ["'a' is not one of b, c", "Choose one of b, c."]),
        (("--kind", "b"), "default changed", False, ["was a and is b now", "Nothing to do"]),
        (("--aging", "x"), "deprecated", False, ["still takes it, with a warning"]),
        (("--becomes-known", 1), "not comparable", False, ["worked out when vLLM starts and is 7"]),
        (("--brand-new", 1), "new", False, ["does not start on 1.0.0"]),
    ],
)
def test_each_kind_of_change(args: tuple[object, ...], kind: str, blocking: bool, words: list[str]) -> None:
    (found,) = changes(BETWEEN, *args)
    assert (found.kind, found.blocking, found.source) == (kind, blocking, "here")
    assert [word for word in words if word not in f"{found.problem} {found.fix}"] == []


@pytest.mark.parametrize("args", [("--same", 5), ("--worked-out", "x"), ()])
def test_what_did_not_change_is_not_mentioned(args: tuple[object, ...]) -> None:
    assert changes(BETWEEN, *args) == []


def test_old_and_new_flags_may_be_mixed() -> None:
    assert [change.kind for change in changes(BETWEEN, "--gone-for-good", 1, "--brand-new", 2)] == ["removed", "new"]


def test_what_no_version_takes_is_an_error() -> None:
    assert BETWEEN.understand(("--nonsense",), "here")[1] is not None


def test_defaults_of_flags_that_nobody_set() -> None:
    found = {change.flag: change for change in BETWEEN.other_defaults(frozenset({"kind"}))}
    assert {flag: change.kind for flag, change in found.items()} == {
        "--becomes-known": "not comparable",
        "--flips": "default changed",
        "--many": "default changed",
    }
    assert "add --no-flips to" in found["--flips"].fix
    assert "add --many x y to" in found["--many"].fix
    assert "can be told" in found["--becomes-known"].fix


def test_a_downgrade_says_what_is_missing_there() -> None:
    (found,) = changes(Upgrade(NEW, OLD), "--brand-new", 2)
    assert (found.kind, found.problem) == ("removed", "vLLM 1.0.0 has no such flag")


@pytest.mark.parametrize(
    ("new", "args", "kind", "words"),
    [
        ("0.33.0", ("--max-num-partial-prefills", 2), "removed", "vLLM 0.27.1 has no such flag any more"),
        ("0.33.0", ("--calculate-kv-scales",), "removed", "vLLM 0.28.0"),
        ("0.33.0", ("--mamba-cache-mode", "all"), "refused", "align"),
        ("0.31.0", ("--log-config-file", "x.json"), "deprecated", "with a warning"),
        ("0.30.0", ("--cp-kv-cache-interleave-size", 1), "not comparable", "was 1 and is worked out"),
    ],
)
def test_what_vllm_really_changed(new: str, args: tuple[object, ...], kind: str, words: str) -> None:
    (found,) = changes(Upgrade(FlagTable.load("0.26.0"), FlagTable.load(new)), *args)
    assert found.kind == kind
    assert words in f"{found.problem} {found.fix}"
