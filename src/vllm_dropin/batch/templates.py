"""Prompts from a Jinja2 template, one file for all rows.

    {% block system %}You answer in {{ language }}.{% endblock %}
    Summarise this review:
    {{ review }}

Columns are variables; `row["any name"]` reaches those whose names are no identifiers. What stands in a block named
`system`, if there is one, is the system message, all else the user's; white space around either is dropped. Lines that
hold only a tag leave no line behind. A variable that a row does not have is an error of that row. It runs in Jinja2's
sandbox.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dropin.batch.kinds import listed
from vllm_dropin.batch.parameters import read_text
from vllm_dropin.errors import ConfigurationError

ROW = "row"
_SYSTEM = "system"
_MISSING_ALLOWED = ("defined", "undefined", "default", "d")
_LONGEST = 300


class TemplateFault(Exception):
    """The template can't be rendered for this row; its text says why."""


@dataclass(frozen=True)
class Rendered:
    """The two parts of a prompt; `system` None when the template has no such block."""

    system: str | None
    user: str


class PromptTemplate:
    """One template, compiled. Raises ConfigurationError, with the line, when it is no valid Jinja2."""

    def __init__(self, text: str, name: str) -> None:
        # Here: jinja2 takes 60 ms to import, and most runs have no template.
        import jinja2
        from jinja2 import meta, nodes
        from jinja2.sandbox import SandboxedEnvironment

        self.text = text
        self._name = name
        environment = SandboxedEnvironment(
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,  # prompts are no HTML
        )
        environment.filters["tojson"] = _tojson
        try:
            tree = environment.parse(text, filename=name)
            code = environment.compile(tree, name, name)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigurationError(
                f"{name}, line {error.lineno}: {error.message}", "It has to be valid Jinja2."
            ) from error
        if any(True for _ in meta.find_referenced_templates(tree)):
            raise ConfigurationError(
                f"{name} includes, imports or extends another template", "Put all of it into one file."
            )
        self._template = environment.template_class.from_code(environment, code, environment.make_globals(None))
        self._has_system = _SYSTEM in self._template.blocks
        allowed = {
            node.node.name
            for node in tree.find_all((nodes.Test, nodes.Filter))
            if node.name in _MISSING_ALLOWED and isinstance(node.node, nodes.Name)
        }
        undeclared = meta.find_undeclared_variables(tree) - set(environment.globals) - {ROW}
        self.variables = frozenset(undeclared)
        self._needed = undeclared - allowed

    def check(self, columns: Iterable[str]) -> None:
        """Refuse a variable that is no column. Raises ConfigurationError."""
        known = list(columns)
        missing = sorted(self._needed - set(known))
        if missing:
            raise ConfigurationError(
                f"{self._name} uses {listed(missing)}, which is no column; there are {listed(known)}",
                "Correct the name, or write {% if name is defined %} around what may be missing.",
            )

    def render(self, values: Mapping[str, object]) -> Rendered:
        """The prompt of one row. Raises TemplateFault."""
        template = self._template
        try:
            context = template.new_context({ROW: values, **values})
            if not self._has_system:
                return Rendered(None, "".join(template.root_render_func(context)).strip())
            system = "".join(template.blocks[_SYSTEM](context))
            context.blocks[_SYSTEM] = [_nothing]
            return Rendered(system.strip(), "".join(template.root_render_func(context)).strip())
        except Exception as error:
            # Whatever the template's own expressions raise: it is this row's fault.
            raise TemplateFault(self._explained(error)) from error

    def _explained(self, error: Exception) -> str:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self._name]
        line = self._template.get_corresponding_lineno(lines[-1]) if lines and lines[-1] else None
        where = f"line {line} of {self._name}" if line else self._name
        return f"{where}: {str(error)[:_LONGEST] or type(error).__name__}"


def read_template(path: Path) -> PromptTemplate:
    """The template that `--template` names. Raises ConfigurationError."""
    return PromptTemplate(read_text(path, "--template"), str(path))


def _nothing(context: Any) -> Iterator[str]:
    yield from ()


def _tojson(value: object, indent: int | None = None) -> str:
    # Jinja2's own escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)
