"""YAML files written by users: any style of valid YAML, but small, without duplicate keys and without aliases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vllm_dropin.errors import ConfigurationError

MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses what YAML allows but no model folder needs."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            # An alias is how a few lines become gigabytes (failure mode 26).
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed here", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (AttributeError, LookupError, TypeError, ValueError):
            # PyYAML trips over `!!int ""` or `!!timestamp x`; and Python reads no number of more than 4,300 digits.
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"this is no {kind}", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"duplicate key '{key.value}'"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


# A date is text to us: `defaultValue: 2024-01-01` has to stay what the user wrote.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class YamlDocument:
    """What a file says, and where: `line(path)` gives the line of a key, for messages."""

    def __init__(self, path: Path, data: Any, root: yaml.Node | None) -> None:
        self.path = path
        self.data = data
        self._root = root

    def line(self, keys: tuple[str | int, ...]) -> int:
        """The line (from 1) of the value at `keys`, or of its nearest parent that is there."""
        node, line = self._root, 1
        for key in keys:
            found: yaml.Node | None = None
            if isinstance(node, yaml.MappingNode):
                for name, value in node.value:
                    if name.value == str(key):
                        found, line = value, name.start_mark.line + 1
            elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
                found = node.value[key]
                line = node.value[key].start_mark.line + 1
            if found is None:
                break
            node = found
        return line

    def place(self, *keys: str | int) -> str:
        """File and line of a key, as messages begin."""
        return f"{self.path.name}, line {self.line(keys)}"


def read_yaml(path: Path) -> YamlDocument:
    """Read one YAML document. Raises ConfigurationError with the file, the line and the reason."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigurationError(f"{path.name} is larger than 1 MiB", "keep data out of it")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path.name} is not UTF-8 (byte {error.start})", "save it as UTF-8") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            data = None if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or error.context or "not valid YAML"
        if problem.startswith("but ") and error.context:
            problem = f"{error.context}, {problem}"
        raise ConfigurationError(f"{path.name}{place}: {problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigurationError(f"{path.name}: {reason}") from None
    return YamlDocument(path, data, root)
