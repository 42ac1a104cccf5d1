"""Which repositories the engine's flags name (decision 11): model, tokenizer, draft model, adapters, configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_dropin.engine.command import EnginePlan

Flags = Mapping[str, str | Sequence[str]]
"""A flag's dest to its value; `speculative_config.model` and its like for keys given as flags of their own."""

_SAFETENSORS = ("*.safetensors",)
_PATTERNS: dict[str, tuple[str, ...]] = {
    # `auto` prefers Mistral's own format where a repository has it, as vLLM does when it is online.
    "auto": ("consolidated*.safetensors", "*.safetensors", "*.bin", "*.pt"),
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    "safetensors": _SAFETENSORS,
    "fastsafetensors": _SAFETENSORS,
    "instanttensor": _SAFETENSORS,
    "mistral": ("consolidated*.safetensors",),
    "bitsandbytes": ("*.safetensors", "*.bin", "*.pt"),
    "pt": ("*.pt",),
    "npcache": ("*.bin",),
    "dummy": (),
}
"""vLLM's choice of weight files for each --load-format, by preference (its default_loader, 0.32)."""
_ADAPTER = ("*.safetensors", "*.bin", "*.pt")
_IGNORE = ("original/**/*",)


@dataclass(frozen=True)
class HubReference:
    """A repository that the engine will read. `revision` None is the default branch.

    `patterns` are the weight files by preference, empty for none; `ignore` is vLLM's --ignore-patterns; `tokenizer`
    asks for one; `code` also fetches the repositories whose code its configuration names, at `code_revision`. `left`,
    when set, is the reason why vLLM fetches it by itself. `also` are further files that somebody else than the engine
    wants, such as the licence; without `pickles`, weights that are Python pickles are refused.
    """

    repo: str
    revision: str | None = None
    patterns: tuple[str, ...] = ()
    ignore: tuple[str, ...] = _IGNORE
    tokenizer: bool = False
    code: bool = False
    code_revision: str | None = None
    left: str = ""
    also: tuple[str, ...] = ()
    pickles: bool = True

    @property
    def weights(self) -> bool:
        return bool(self.patterns)

    def asked(self) -> dict[str, Any]:
        """As the child reads it."""
        return {
            "repo": self.repo,
            "revision": self.revision,
            "patterns": self.patterns,
            "ignore": self.ignore,
            "tokenizer": self.tokenizer,
            "code": self.code,
            "code_revision": self.code_revision,
            "also": self.also,
            "pickles": self.pickles,
        }


def references(model: str, flags: Flags, base: Path | None = None) -> tuple[HubReference, ...]:
    """Every repository that `model` and the flags name, the model first, each once. Local folders are left out.

    `base` is the engine's working directory, where relative paths begin. Malformed JSON is left to the check of the
    flags, which knows where it was written.
    """
    found: dict[HubReference, None] = {}
    for reference in _all(model, _Reader(flags), base):
        if not _local(reference.repo, base):
            found[_judged(reference)] = None
    return tuple(found)


def flag_values(plan: EnginePlan) -> dict[str, Sequence[str]]:
    """The engine's flags as dest to values; a dotted JSON key is an entry of its own, `dest.key`."""
    values: dict[str, Sequence[str]] = {}
    for flag in plan.flags:
        name, equals, value = flag.tokens[0].partition("=")
        dotted = name.partition(".")[2]
        key = f"{flag.dest}.{dotted}" if dotted else flag.dest
        values[key] = (value, *flag.tokens[1:]) if equals else flag.tokens[1:]
    return values


def bundled(plan: EnginePlan, folder: Path) -> EnginePlan:
    """The plan of a model whose manifest has been verified: it is whole, so the engine starts offline.

    Unless a flag names something else that is on a hub.
    """
    assert plan.model.reference is not None  # it has been verified
    return replace(plan, offline=not references(plan.model.reference, flag_values(plan), folder))


class _Reader:
    """The flags' values, with JSON opened and dotted keys put in."""

    def __init__(self, flags: Flags) -> None:
        self._flags = flags

    def text(self, dest: str) -> str | None:
        value = self._flags.get(dest)
        if value is not None and not isinstance(value, str):
            value = value[-1] if value else None
        return value or None

    def texts(self, dest: str) -> tuple[str, ...]:
        value = self._flags.get(dest, ())
        return (value,) if isinstance(value, str) else tuple(value)

    def on(self, dest: str) -> bool:
        return dest in self._flags and (self.text(dest) or "").lower() not in ("false", "0")

    def json(self, dest: str) -> dict[str, Any]:
        value = _object(self.text(dest))
        for name in self._flags:
            if name.startswith(f"{dest}."):
                value[name.removeprefix(f"{dest}.").replace("-", "_")] = self.text(name)
        return value


def _object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _all(model: str, flags: _Reader, base: Path | None) -> Iterator[HubReference]:
    revision, code_revision = flags.text("revision"), flags.text("code_revision")
    load_format = (flags.text("load_format") or "auto").lower()
    patterns = _PATTERNS.get(load_format)
    ignore = flags.texts("ignore_patterns") or _IGNORE
    code = flags.on("trust_remote_code")
    tokenizer, tokenizer_revision = flags.text("tokenizer"), flags.text("tokenizer_revision")
    own_tokenizer = (
        tokenizer in (None, model) and tokenizer_revision in (None, revision) and not flags.on("skip_tokenizer_init")
    )
    left = "" if patterns is not None else f"--load-format {load_format} fetches its own weights"
    yield HubReference(model, revision, patterns or (), ignore, own_tokenizer, code, code_revision, left=left)
    if code and code_revision not in (None, revision):
        yield HubReference(model, code_revision)
    if tokenizer not in (None, model) or tokenizer_revision not in (None, revision):
        yield HubReference(
            tokenizer or model, tokenizer_revision, tokenizer=True, code=code, code_revision=code_revision
        )
    if configuration := flags.text("hf_config_path"):
        yield HubReference(configuration, revision, code=code, code_revision=code_revision)
    if (generation := flags.text("generation_config")) not in (None, "auto", "vllm", model):
        assert generation is not None  # for the type checker: None is in the tuple
        yield HubReference(generation)
    yield from _draft(model, flags, patterns, left, code)
    yield from _adapters(flags)


def _draft(
    model: str, flags: _Reader, patterns: tuple[str, ...] | None, left: str, code: bool
) -> Iterator[HubReference]:
    """The draft model of --speculative-config or --spec-model. A name without a slash is a method or a Python path."""
    speculative = flags.json("speculative_config")
    draft = speculative.get("model") or flags.text("spec_model")
    if isinstance(draft, str) and draft != model and "/" in draft:
        revision, code_revision = speculative.get("revision"), speculative.get("code_revision")
        yield HubReference(draft, revision, patterns or (), code=code, code_revision=code_revision, left=left)


def _adapters(flags: _Reader) -> Iterator[HubReference]:
    """--lora-modules (name=path, or JSON with path) and --default-mm-loras (modality to path)."""
    for module in flags.texts("lora_modules"):
        path = _object(module).get("path") if module.lstrip().startswith("{") else module.partition("=")[2]
        if isinstance(path, str) and path:
            yield HubReference(path, patterns=_ADAPTER)
    for path in flags.json("default_mm_loras").values():
        if isinstance(path, str):
            yield HubReference(path, patterns=_ADAPTER)


def _local(name: str, base: Path | None) -> bool:
    """A path, be it there or not, rather than a repository. What does not look like one counts when it exists."""
    return name.startswith(("/", ".", "~")) or ((base or Path()) / name).exists()


def _judged(reference: HubReference) -> HubReference:
    """The reference, marked when its name is of a kind that we don't fetch."""
    reason = reference.left
    if "://" in reference.repo:
        reason = "an address of another storage"
    elif ":" in reference.repo or reference.repo.endswith(".gguf") or reference.repo.count("/") > 1:
        reason = "a single file of a repository"
    if reason == reference.left:
        return reference
    return HubReference(reference.repo, reference.revision, left=reason)
