"""Runtime parameters: the contract's table, what a folder defines beside it, and their values from all sources.

Strongest first (decision 9): `--param`, the values file, an envelope `MLOPS_RUNTIME_PARAM_<name>`, the default of the
metadata, our default. A null says nothing: the next source decides. A bare variable `<name>` is never read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.contract import CONTRACT, Parameter
from vllm_dropin.model.credential import Credential
from vllm_dropin.model.metadata import FILE_NAME, Metadata, ParameterDefinition, ParameterType
from vllm_dropin.model.nearest import did_you_mean
from vllm_dropin.model.values import Payload, coerce
from vllm_dropin.model.yaml_file import read_yaml

ENVELOPE_PREFIX = "MLOPS_RUNTIME_PARAM_"
METADATA_DEFAULT = f"{FILE_NAME} default"
DEFAULT = "default"


_KNOWN = {parameter.name: parameter for parameter in CONTRACT}


@dataclass(frozen=True)
class ParameterValue:
    """A parameter with its value. `payload` is the value as the folder's own definition types it, for the hook."""

    name: str
    value: Payload
    source: str
    overrode: tuple[str, ...] = ()
    payload: Payload = None
    type: ParameterType = "string"
    declared: bool = False

    @property
    def given(self) -> bool:
        """Somebody said it: it is not our default."""
        return self.source != DEFAULT


@dataclass(frozen=True)
class ParameterValues:
    """All parameters by name: the contract's, and those that the folder defines for its hook."""

    by_name: Mapping[str, ParameterValue]
    warnings: tuple[str, ...] = ()

    def get(self, name: str) -> ParameterValue:
        return self.by_name[name]

    def text(self, name: str) -> str | None:
        """A string parameter; None when unset or empty."""
        value = self.by_name[name].value
        return value if isinstance(value, str) and value else None

    def number(self, name: str) -> float | None:
        value = self.by_name[name].value
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def whole(self, name: str) -> int | None:
        value = self.number(name)
        return None if value is None else int(value)

    def truth(self, name: str) -> bool:
        return self.by_name[name].value is True

    def credential(self, name: str) -> Credential | None:
        value = self.by_name[name].value
        return value if isinstance(value, Credential) else None

    def secrets(self) -> tuple[str, ...]:
        """Every text of every credential, for the log's redactor."""
        values = (value.payload for value in self.by_name.values())
        return tuple(text for value in values if isinstance(value, Credential) for text in value.secrets())


def exported(values: ParameterValues) -> dict[str, str]:
    """The envelopes for the hook's environment: every defined parameter, null if unset, and every other given one."""
    return {
        f"{ENVELOPE_PREFIX}{value.name}": json.dumps({"type": value.type, "payload": _plain(value.payload)})
        for value in values.by_name.values()
        if value.declared or value.given
    }


def _meant(name: str) -> str | None:
    """The parameter of ours that a definition differs from only by case or underscores: `maxTokens`."""
    plain = {_squeezed(known): known for known in _KNOWN}
    return None if name in _KNOWN else plain.get(_squeezed(name))


def _squeezed(name: str) -> str:
    return name.replace("_", "").lower()


def _plain(payload: Payload) -> object:
    return payload.reveal() if isinstance(payload, Credential) else payload


def read_parameters(
    metadata: Metadata | None,
    environ: Mapping[str, str],
    values_file: Path | None = None,
    params: Sequence[str] = (),
) -> ParameterValues:
    """Find the value of every parameter. Raises ConfigurationError that names the source and the parameter."""
    definitions = {item.fieldName: item for item in (metadata.runtimeParameterDefinitions if metadata else ())}
    reader = _Reader(definitions)
    # Weakest first, so that the strongest is the last to be told and each knows what it beat.
    for definition in definitions.values():
        if (meant := _meant(definition.fieldName)) is not None:
            reader.warnings.append(
                f"parameter {definition.fieldName} of {FILE_NAME} is for custom.py only; did you mean '{meant}'?"
            )
        if definition.type != "credential":
            reader.offer(definition.fieldName, definition.defaultValue, METADATA_DEFAULT)
    reader.offer_envelopes(environ)
    if values_file is not None:
        reader.offer_file(values_file)
    for param in params:
        reader.offer_param(param)
    return reader.values()


@dataclass
class _Reader:
    """Collects what each source says."""

    definitions: Mapping[str, ParameterDefinition]
    found: dict[str, ParameterValue] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def knows(self, name: str) -> bool:
        return name in _KNOWN or name in self.definitions

    def names(self) -> list[str]:
        return [*_KNOWN, *self.definitions]

    def kind(self, name: str) -> ParameterType:
        """The type that the folder declares, else the contract's."""
        declared = self.definitions.get(name) or _KNOWN.get(name)
        return declared.type if declared else "string"

    def offer(self, name: str, payload: object, source: str) -> None:
        """Take a stronger source's word for a parameter; null says nothing."""
        definition, known, kind = self.definitions.get(name), _KNOWN.get(name), self.kind(name)
        place = f"parameter {name} ({source})"
        # The folder may declare max_model_len as a string or as a number: what it declares is what its hook gets.
        typed = coerce(payload, kind, place, loose=definition is None and name == "max_model_len")
        if typed is None:
            return
        if definition is not None:
            _check_range(typed, definition.minValue, definition.maxValue, known, place)
        value = _understand(typed, known, place) if known else typed
        before = self.found.get(name)
        overrode: tuple[str, ...] = before.overrode if before else ()
        if before is not None and before.source != source:  # of `--param` twice, the last wins
            overrode = (f"{before.value} ({before.source})", *overrode)
        self.found[name] = ParameterValue(name, value, source, overrode, typed, kind, definition is not None)

    def offer_envelopes(self, environ: Mapping[str, str]) -> None:
        for variable in sorted(environ):
            if not variable.startswith(ENVELOPE_PREFIX) or not environ[variable]:
                continue
            name = variable.removeprefix(ENVELOPE_PREFIX)
            if self.knows(name):
                self.offer(name, _open_envelope(variable, environ[variable], self.kind(name)), variable)
                continue
            self._hide(name, variable, environ[variable])
            if name.lower() in (known.lower() for known in self.names()):
                self.warnings.append(f"{variable} is not used{did_you_mean(name, self.names())} (case counts)")

    def _hide(self, name: str, variable: str, text: str) -> None:
        """Keep a credential that the folder does not define: its hook can read it, so its texts must stay hidden."""
        try:
            envelope = json.loads(text)
        except (ValueError, RecursionError):
            return
        if isinstance(envelope, dict) and envelope.get("type") == "credential":
            fields = envelope.get("payload")
            if isinstance(fields, dict):
                secret = Credential(fields)
                self.found[name] = ParameterValue(name, secret, variable, (), secret, "credential")

    def offer_file(self, path: Path) -> None:
        document = read_yaml(path)
        if document.data is None:
            return
        if not isinstance(document.data, dict):
            raise ConfigurationError(f"{path.name} has to be a mapping of parameter names to values")
        for key, payload in document.data.items():
            name = str(key)
            if self.knows(name):
                self.offer(name, payload, document.place(key))
            else:
                hint = did_you_mean(name, self.names())
                self.warnings.append(f"{document.place(key)}: parameter '{name}' is not defined, ignored{hint}")

    def offer_param(self, param: str) -> None:
        name, equals, text = param.partition("=")
        if not equals or not name:
            raise ConfigurationError(f"--param {name}: a value is missing", "write --param NAME=VALUE")
        if not self.knows(name):
            hint = did_you_mean(name, self.names())
            raise ConfigurationError(
                f"--param {name}: there is no such parameter{hint}",
                "use a name of docs/runtime-parameters.md, or define it in model-metadata.yaml",
            )
        payload: object = text
        if self.kind(name) == "credential":
            payload = _credential_of(text)
            self.warnings.append(f"--param {name}: other users of this machine can read a command line")
        self.offer(name, payload, "--param")

    def values(self) -> ParameterValues:
        result: dict[str, ParameterValue] = {}
        for name in dict.fromkeys([*self.names(), *self.found]):
            definition, known, kind = self.definitions.get(name), _KNOWN.get(name), self.kind(name)
            found = self.found.get(name)
            default = known.default if known else None
            if found is None:
                if definition is not None and not definition.allowEmpty:
                    self.warnings.append(
                        f"parameter {name} has no value, and model-metadata.yaml says that it needs one"
                    )
                found = ParameterValue(name, default, DEFAULT, (), None, kind, definition is not None)
            elif found.value is None and default is not None:
                found = ParameterValue(name, default, DEFAULT, (), found.payload, kind, found.declared)
            result[name] = found
        return ParameterValues(result, tuple(self.warnings))


def _open_envelope(variable: str, text: str, kind: ParameterType) -> object:
    """The payload for a parameter of this type. The text is not repeated in messages: it may be a credential."""
    try:
        envelope = json.loads(text)
    except (ValueError, RecursionError):
        envelope = None
    if not isinstance(envelope, dict) or "payload" not in envelope:
        raise ConfigurationError(
            f'{variable} is not an envelope {{"type": …, "payload": …}}', "give plain values with --param NAME=VALUE"
        )
    payload = envelope["payload"]
    if envelope.get("type") == "credential" and kind != "credential" and payload is not None:
        # Other types are taken from the declaration, but messages may quote their values.
        raise ConfigurationError(f"{variable} is a credential, and the parameter is declared as {kind}")
    return payload


def _credential_of(text: str) -> object:
    """`{"apiToken": …}` as JSON, or the bare token."""
    if not text:
        return None
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return {"credentialType": "apiToken", "apiToken": text}


def _check_range(
    value: Payload, minimum: float | None, maximum: float | None, known: Parameter | None, place: str
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if known is not None and known.zero_unset and value == 0:
        return
    if minimum is not None and value < minimum:
        raise ConfigurationError(f"{place}: {value} is below the minimum of {minimum:g}")
    if maximum is not None and value > maximum:
        raise ConfigurationError(f"{place}: {value} is above the maximum of {maximum:g}")


def _understand(payload: Payload, known: Parameter, place: str) -> Payload:
    """What the contract means by a value that is typed as the folder declares it."""
    value = coerce(payload, known.type, place, loose=known.name == "max_model_len")
    if known.name == "max_model_len" and isinstance(value, str):
        value = _context_length(value)
    if isinstance(value, float) and value.is_integer() and (known.whole or known.name == "max_model_len"):
        value = int(value)
    if known.zero_unset and not isinstance(value, bool) and value == 0:
        return None
    if known.name == "max_model_len" and isinstance(value, int | float) and value < 0 and value != -1:
        raise ConfigurationError(f"{place}: {value} is not a length", known.meaning)
    if isinstance(value, float) and known.whole:
        raise ConfigurationError(f"{place}: {value} is not a whole number")
    _check_range(value, known.minimum, known.maximum, known, place)
    if known.choices and value not in (*known.choices, ""):
        hint = did_you_mean(str(value), known.choices)
        raise ConfigurationError(f"{place}: '{value}' is not one of {', '.join(known.choices)}{hint}")
    return None if value == "" and known.default is not None else value


def _context_length(text: str) -> Payload:
    """A number where it is one; other spellings are vLLM's to judge, and its flag table's."""
    text = text.strip()
    whole = re.fullmatch(r"(-?\d+)(\.0*)?", text)
    return int(whole[1]) if whole else (text or None)
