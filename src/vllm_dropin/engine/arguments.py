"""Reads engine arguments as vLLM does: which words are flags, and which values belong to which flag.

The rules are those of vLLM's FlexibleArgumentParser on top of argparse: underscores are dashes, unique prefixes
count, `-O3` is `--optimization-level 3`, `--x.key v` adds to the JSON of `--x`, the last use wins. What vLLM would take
without a word and the user cannot have meant (`--config=file`, `--enforce-eager true`) is an error here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vllm_dropin.engine import values
from vllm_dropin.errors import FlagError

_NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+")
_UNKNOWN_REMEDY = "Correct or remove it. `vllm serve --help=all` lists what this vLLM takes."
_SECRET_NAME = re.compile(r"key|token|secret|password")
_BOOLEAN_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "0", "1", "none", "null"})


@dataclass(frozen=True)
class FlagSpec:
    """One flag of vLLM's parser, with every spelling that it accepts."""

    dest: str
    options: tuple[str, ...] = ()
    nargs: int | str | None = None
    type: str | None = None
    choices: tuple[object, ...] = ()
    default: object = None
    """None also where vLLM works the value out later: then it says nothing about what will be used."""
    off: tuple[str, ...] = ()
    """The spellings that switch a boolean flag off."""
    deprecated: bool = False

    @property
    def boolean(self) -> bool:
        """Whether the flag takes no value."""
        return self.nargs == 0


@dataclass(frozen=True)
class FlagUse:
    """One use of a flag on a command line."""

    dest: str
    option: str
    """As the user wrote it, without value: `--max_model_len`, `-tp`, `-O`."""
    values: tuple[str, ...]
    tokens: tuple[str, ...]
    """The words that made it up, to be passed on unchanged."""
    key: str | None = None
    """`a.b` of `--flag.a.b value`; ends in `+` where the value is to be added to a list."""
    off: bool = False
    """A boolean flag in a form that switches it off."""
    index: int = 0
    """Position of the first token among the arguments."""

    @property
    def canonical(self) -> str:
        """The flag's long name, `--max-model-len`. vLLM derives every dest from it."""
        return "--" + self.dest.replace("_", "-")


@dataclass(frozen=True)
class ParsedArgs:
    """Engine arguments, understood."""

    uses: tuple[FlagUse, ...] = ()
    positionals: tuple[str, ...] = ()
    """The model, at most one. Only `vllm serve` reads it; the API server module ignores it."""
    warnings: tuple[str, ...] = ()

    def last(self, dest: str) -> FlagUse | None:
        """The use that wins. Dotted keys win over a whole value wherever they stand: vLLM moves them to the end."""
        found = self.all(dest)
        return next(iter([use for use in reversed(found) if use.key] or reversed(found)), None)

    def all(self, dest: str) -> tuple[FlagUse, ...]:
        return tuple(use for use in self.uses if use.dest == dest)


@dataclass(frozen=True)
class _Word:
    """One argument: as vLLM rewrites it, as it was written, and where."""

    text: str
    raw: str
    index: int
    spec: FlagSpec | None = None
    option: str = ""
    attached: str | None = None
    """The value after `=`."""


class Reader:
    """Reads the arguments of one origin against one table of options."""

    def __init__(self, options: Mapping[str, FlagSpec], origin: str, explain: Callable[[str], str]) -> None:
        """`origin` names the source in messages; `explain` says more about an option that is unknown."""
        self._options = options
        self._specs = {spec.dest: spec for spec in options.values()}
        self._origin = origin
        self._explain = explain

    def read(self, args: Sequence[object]) -> ParsedArgs:
        """Raises FlagError, which names the origin and the index of the argument at fault."""
        raws = [self._text(arg, i) for i, arg in enumerate(args)]
        words = [
            _rewrite(raw, i, following) for i, (raw, following) in enumerate(zip(raws, [*raws, ""][1:], strict=True))
        ]
        dotted, words = self._take_dotted(words)
        uses, positionals = self._take_flags(words)
        uses = sorted([*uses, *dotted], key=lambda use: use.index)
        parsed = ParsedArgs(tuple(uses), tuple(word.raw for word in positionals))
        warnings = [*self._swallowed(parsed), *self._remarks(uses)]
        return ParsedArgs(parsed.uses, parsed.positionals, tuple(warnings))

    def _fail(self, index: int, problem: str, remedy: str = "") -> FlagError:
        return FlagError(f"{problem} in {self._origin} (args[{index}])", remedy)

    def _text(self, arg: object, index: int) -> str:
        if isinstance(arg, str):
            return arg
        if isinstance(arg, bool):
            return "true" if arg else "false"
        if isinstance(arg, int | float):
            return str(arg)
        problem = f"an argument must be text or a number, not {'null' if arg is None else type(arg).__name__},"
        raise self._fail(index, problem, 'Write JSON values as one string: "{\\"key\\": 1}".')

    def _take_dotted(self, words: list[_Word]) -> tuple[list[FlagUse], list[_Word]]:
        """Take `--flag.key value` out before all else, as vLLM does: the word after it is its value whatever it is."""
        uses: list[FlagUse] = []
        rest: list[_Word] = []
        queue = iter(words)
        for word in queue:
            name, equals, value = word.text.partition("=")
            if not word.text.startswith("-") or "." not in name:
                rest.append(word)
                continue
            if _NEGATIVE_NUMBER.fullmatch(name):
                remedy = f"vLLM reads it as the flag {name.split('.')[0]}; join it to its flag: --flag={name}"
                raise self._fail(word.index, f"negative fraction {name}", remedy)
            flag, _, key = name.partition(".")
            found = self._classify(_Word(flag, word.raw, word.index))
            if found.spec is None:
                self._check_split(word)
                raise self._unknown(found)
            if found.spec.boolean or not values.takes_keys(found.spec.type, found.spec.choices):
                raise self._fail(word.index, f"{name}: {found.option} takes no keys", "Give it a plain value.")
            tokens = [word.raw]
            if not equals:
                following = next(queue, None)
                if following is None:
                    raise self._fail(word.index, f"{name} has no value")
                value = following.raw
                tokens.append(value)
            option = word.raw.partition(".")[0]
            uses.append(FlagUse(found.spec.dest, option, (value,), tuple(tokens), key=key, index=word.index))
        return uses, rest

    def _take_flags(self, words: list[_Word]) -> tuple[list[FlagUse], list[_Word]]:
        """Give each flag the words that follow it, as many as it takes."""
        uses: list[FlagUse] = []
        positionals: list[_Word] = []
        end = next((i for i, word in enumerate(words) if word.text == "--"), len(words))
        words = [self._classify(word) for word in words[:end]] + words[end:]
        position = 0
        while position < len(words):
            word = words[position]
            position += 1
            if word.text == "--" and position == end + 1:
                continue
            if word.spec is None:
                self._check_positional(word, uses[-1] if uses else None)
                positionals.append(word)
                continue
            limit = next((i for i in range(position, end) if words[i].spec), end)
            given = words[position:limit][: _most(word.spec)] if word.attached is None else []
            position += len(given)
            uses.append(self._use(word, word.spec, given))
        if len(positionals) > 1:
            extra = positionals[1]
            remedy = f"{positionals[0].raw!r} is already the model. A flag's values must follow it at once."
            raise self._fail(extra.index, f"stray value {extra.raw!r}", remedy)
        return uses, positionals

    def _use(self, word: _Word, spec: FlagSpec, following: list[_Word]) -> FlagUse:
        """One flag with its values, checked."""
        name = word.option
        if word.attached is not None and spec.boolean:
            hint = f", or {spec.off[0]} to switch it off" if spec.off and name not in spec.off else ""
            raise self._fail(word.index, f"{name} takes no value but has one", f"Write {name}{hint}.")
        texts = tuple(item.raw for item in following) if word.attached is None else (word.attached,)
        if not _least(spec) <= len(texts) <= _most(spec):
            raise self._fail(word.index, f"{name} needs {_wanted(spec)} but has {len(texts) or 'none'}")
        if spec.dest == "help":
            raise self._fail(word.index, f"{name} prints help instead of serving", f"Remove {name}.")
        if spec.dest == "config":
            self._check_config(word, texts[0])
        for text in texts:
            try:
                values.check(spec.type, spec.choices, text)
            except values.BadValue as problem:
                raise self._fail(word.index, f"{name}: {problem},") from None
        option = word.raw[:2] if word.raw.startswith("-O") else word.raw.partition("=")[0]
        tokens = (word.raw, *(item.raw for item in following))
        return FlagUse(spec.dest, option, texts, tokens, off=name in spec.off, index=word.index)

    def _check_config(self, word: _Word, path: str) -> None:
        """vLLM looks for the exact word `--config` and passes over `--config=file`."""
        if word.raw != "--config":
            remedy = f'Write two arguments: "--config", "{path}".'
            raise self._fail(word.index, f"vLLM ignores the config file in {word.raw}", remedy)
        if not path.endswith((".yaml", ".yml")):
            raise self._fail(word.index, f"--config: {path!r} is not a .yaml file", "vLLM reads only YAML there.")

    def _check_positional(self, word: _Word, before: FlagUse | None) -> None:
        """A word that belongs to no flag is the model to vLLM, be it `true` or a whole flag in one string."""
        if before is not None and not before.values and word.text.lower() in _BOOLEAN_WORDS:
            remedy = f"{before.option} takes no value, and vLLM would take {word.raw!r} for the model. Remove it."
            raise self._fail(word.index, f"{word.raw!r} after {before.option}", remedy)
        self._check_split(word)

    def _check_split(self, word: _Word) -> None:
        """`"--max-model-len 4096"` as one argument is a value to vLLM, not a flag."""
        name, space, value = word.raw.partition(" ")
        if space and name.startswith("-"):
            shown = "…" if _SECRET_NAME.search(name) else value.strip()  # --hf-token hf_…
            remedy = f'Write two arguments: "{name}", "{shown}".'
            raise self._fail(word.index, f"{name} and its value in one argument,", remedy)

    def _classify(self, word: _Word) -> _Word:
        """Find the flag that a word names, in argparse's order; no flag means a value. Unknown flags raise."""
        text = word.text
        if len(text) < 2 or not text.startswith("-"):
            return word
        if text in self._options:
            return _Word(text, word.raw, word.index, self._options[text], text)
        name, equals, value = text.partition("=")
        attached = value if equals else None
        if equals and name in self._options:
            return _Word(text, word.raw, word.index, self._options[name], name, attached)
        if text.startswith("--"):
            matches = [(option, attached) for option in self._options if option.startswith(name)]
        else:
            matches = [(option, None) for option in self._options if option.startswith(text)]
            if text[:2] in self._options:
                matches.append((text[:2], text[2:]))
        if len(matches) > 1:
            options = ", ".join(sorted(option for option, _ in matches)[:6])
            raise self._fail(word.index, f"ambiguous flag {name}", f"It could be {options}.")
        if matches:
            option, attached = matches[0]
            return _Word(text, word.raw, word.index, self._options[option], option, attached)
        if _NEGATIVE_NUMBER.fullmatch(text) or " " in text:
            return word
        raise self._unknown(word)

    def _unknown(self, word: _Word) -> FlagError:
        name = word.text.partition("=")[0]
        more = self._explain(name)
        problem = f"unknown flag {name} in {self._origin} (args[{word.index}])"
        return FlagError(f"{problem}; {more}" if more else problem, _UNKNOWN_REMEDY)

    def _swallowed(self, parsed: ParsedArgs) -> Iterable[str]:
        """`--served-model-name a b MODEL` makes MODEL a third name: say so when no model is named elsewhere."""
        if parsed.positionals or parsed.last("model") or parsed.last("config"):
            return
        for use in parsed.uses:
            spec = self._specs[use.dest]
            greedy = len(use.values) > (0 if spec.nargs == "?" else 1) and spec.nargs in {"?", "+", "*"}
            if greedy and len(use.tokens) > 1 and "/" in use.values[-1]:
                yield (
                    f"{use.option} in {self._origin} takes every word up to the next flag, so "
                    f"args[{use.index + len(use.tokens) - 1}] is one of its values; if that is the model, "
                    f"write it after --model"
                )

    def _remarks(self, uses: Iterable[FlagUse]) -> Iterable[str]:
        for use in uses:
            if self._specs[use.dest].deprecated:
                yield f"{use.option} in {self._origin} is deprecated by vLLM"


def _rewrite(raw: str, index: int, following: str) -> _Word:
    """A word as vLLM sees it: dashes for underscores up to the first dot or `=`, and `-O` spelled out."""
    if raw.startswith("--"):
        head, equals, value = raw.partition("=")
        name, dot, key = head[2:].partition(".")
        return _Word(f"--{name.replace('_', '-')}{dot}{key}{equals}{value}", raw, index)
    if raw == "-O" and following in {"0", "1", "2", "3"}:
        return _Word("--optimization-level", raw, index)
    if raw.startswith("-O") and raw != "-O":
        return _Word(f"--optimization-level={raw[2:].removeprefix('=')}", raw, index)
    return _Word(raw, raw, index)


def _least(spec: FlagSpec) -> int:
    if isinstance(spec.nargs, int):
        return spec.nargs
    return 0 if spec.nargs in {"?", "*"} else 1


def _most(spec: FlagSpec) -> int:
    if isinstance(spec.nargs, int):
        return spec.nargs
    return 1 if spec.nargs in {None, "?"} else 1 << 30


def _wanted(spec: FlagSpec) -> str:
    least = _least(spec)
    if least == _most(spec):
        return "one value" if least == 1 else f"{least} values"
    return "one value or more" if least else "at most one value"
