"""Our own options: a flag, else its variables, else the default. Remembers where each came from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.nearest import did_you_mean
from vllm_dropin.settings.cascade import Candidate, Setting, settle
from vllm_dropin.settings.options import BY_KEY, KEYS_VARIABLE, OPTIONS, Flags

T = TypeVar("T")

_SIZE = re.compile(r"(\d+)\s*(|b|k|kb|kib|m|mb|mib|g|gb|gib)", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


@dataclass
class Choices:
    """Reads options one by one; `settings` has the lines for the report."""

    flags: Flags
    environ: Mapping[str, str]
    settings: list[Setting] = field(default_factory=list)

    def text(self, key: str) -> str | None:
        """An option as text; None when nobody gave it and it has no default."""
        option = BY_KEY[key]
        found = [Candidate(self.flags.options[key], option.flag)] if self.flags.options.get(key) else []
        found += [Candidate(self.environ[name], name) for name in option.variables if self.environ.get(name)]
        setting = settle(key, [*found, Candidate(option.default or None, "default")])
        self.settings.append(setting)
        return setting.value if isinstance(setting.value, str) else None

    def read(self, key: str, parse: Callable[[str], T], otherwise: tuple[T, str] | None = None) -> T:
        """An option, parsed; a ValueError of `parse` becomes a ConfigurationError.

        `otherwise` is for one without a fixed default: the value when nobody gave it, and why.
        """
        text = self.text(key)
        if text is None and otherwise is not None:
            self.tell(key, *otherwise)
            return otherwise[0]
        try:
            return parse(text or "")
        except ValueError as error:
            raise ConfigurationError(f"{key} ({self.source(key)}): '{text}' {error}") from None

    def switch(self, key: str) -> bool:
        """A switch is on when its variable is set to anything that does not say no."""
        return (self.text(key) or "no").strip().lower() not in ("no", "false", "0", "off")

    def path(self, key: str) -> Path | None:
        text = self.text(key)
        return expanded(text, f"{key} ({self.source(key)})").absolute() if text else None

    def file(self, key: str) -> Path | None:
        """The path of a file that has to be there."""
        path = self.path(key)
        if path is not None and not path.is_file():
            raise ConfigurationError(
                f"{key} ({self.source(key)}): there is no file {path}", f"Correct the path, or leave {key} out."
            )
        return path

    def folders(self, key: str) -> tuple[Path, ...]:
        """Folders that have to be there, joined by `:` as in PATH."""
        found = []
        for part in (self.text(key) or "").split(":"):
            if not part:
                continue
            path = expanded(part, f"{key} ({self.source(key)})").absolute()
            if not path.is_dir():
                raise ConfigurationError(
                    f"{key} ({self.source(key)}): there is no folder {path}", f"Correct the path, or leave {key} out."
                )
            found.append(path)
        return tuple(found)

    def tell(self, key: str, value: object, why: str) -> None:
        """Report a value that was worked out for an option that nobody gave."""
        at = next(i for i, setting in enumerate(self.settings) if setting.name == key)
        self.settings[at] = Setting(key, value, why)

    def source(self, key: str) -> str:
        return next(setting.source for setting in reversed(self.settings) if setting.name == key)


def expanded(text: str, place: str) -> Path:
    """A path with the home folder in place of its `~`. Raises ConfigurationError for a user who has none."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigurationError(f"{place}: '{text}' is in the home folder of nobody", "Write the path out.") from None


def unknown_variables(environ: Mapping[str, str]) -> tuple[str, ...]:
    """A warning for each VLLM_DROPIN_ variable that is no option of ours."""
    known = {option.variable for option in OPTIONS} | {KEYS_VARIABLE}
    return tuple(
        f"{name} is not known{did_you_mean(name, known)}"
        for name in sorted(environ)
        if name.startswith("VLLM_DROPIN_") and name not in known
    )


def count(minimum: int) -> Callable[[str], int]:
    """A parser for whole numbers from `minimum` on."""

    def parse(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < minimum:
            raise ValueError(f"is not a whole number of at least {minimum}")
        return int(text)

    return parse


def seconds(text: str) -> float:
    """A duration: seconds, not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("is not a number of seconds")
    return value


def size(text: str) -> int:
    """Bytes, with an optional unit: `8MiB`, `512k`. Units are powers of 1024; at least 1 KiB."""
    found = _SIZE.fullmatch(text.strip())
    value = int(found[1]) * _UNITS[found[2].lower()[:1]] if found else 0
    if value < 1024:
        raise ValueError("is not a size of at least 1KiB, such as 8MiB")
    return value


def address(text: str) -> tuple[str, int]:
    """`host:port`, `host` (port 8080), `[::1]:8080`."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+)(?::(\d{1,5}))?", text.strip())
    if found is None or found[1].isdigit() or not 0 <= int(found[2] or 8080) <= 65535:
        raise ValueError("is not HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080")
    return found[1].strip("[]"), int(found[2] or 8080)


def url_prefix(text: str) -> str:
    """A path in front of all routes: "" or "/a/b", whatever slashes were written."""
    path = "/".join(part for part in text.strip().split("/") if part)
    if not re.fullmatch(r"[A-Za-z0-9._~/-]*", path) or any(part in (".", "..") for part in path.split("/")):
        raise ValueError("is not a plain path, such as /my/model")
    return f"/{path}" if path else ""


def level(text: str) -> str:
    """A logging level."""
    name = {"warn": "WARNING", "fatal": "CRITICAL"}.get(text.strip().lower(), text.strip().upper())
    if name not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise ValueError("is not one of debug, info, warning, error")
    return name
