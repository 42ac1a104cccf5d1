"""model-metadata.yaml: what the model is called, what it is for, and which runtime parameters it declares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.nearest import did_you_mean
from vllm_dropin.model.yaml_file import YamlDocument, read_yaml

FILE_NAME = "model-metadata.yaml"

ParameterType = Literal["string", "boolean", "numeric", "credential", "deployment"]


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _empty_list(value: object) -> object:
    return [] if value is None else value


class ParameterDefinition(BaseModel):
    """One entry of `runtimeParameterDefinitions` (contract, section 1)."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    fieldName: str = Field(min_length=1)
    type: Annotated[ParameterType, BeforeValidator(_lower)]
    defaultValue: str | bool | int | float | dict[str, Any] | None = None
    minValue: int | float | None = None
    maxValue: int | float | None = None
    allowEmpty: bool = True
    credentialType: str | None = None
    description: str | None = None


class Metadata(BaseModel):
    """The whole file. Keys that mean nothing to a text-generation service may hold anything; `/info/` shows them."""

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)
    name: str
    type: str
    targetType: str
    environmentID: Any = None
    validation: Any = None
    modelID: Any = None
    description: Any = None
    majorVersion: Any = None
    inferenceModel: Any = None
    trainingModel: Any = None
    hyperparameters: Any = None
    typeSchema: Any = None
    inputSchema: Any = None
    customPredictor: Any = None
    runtimeParameterDefinitions: Annotated[tuple[ParameterDefinition, ...], BeforeValidator(_empty_list)] = ()
    userCredentialSpecifications: Any = None
    lazyLoading: Any = None


def read_metadata(path: Path) -> tuple[Metadata, dict[str, Any], tuple[str, ...]]:
    """Read the file: the typed metadata, the same as plain data (for `/info/`), and warnings.

    Raises ConfigurationError that names the file, the key and the line.
    """
    document = read_yaml(path)
    if not isinstance(document.data, dict):
        raise ConfigurationError(
            f"{FILE_NAME} has to be a mapping of keys to values", "it needs at least: name, type, targetType"
        )
    try:
        metadata = Metadata.model_validate(document.data)
    except ValidationError as error:
        raise _first_error(document, error) from None
    if metadata.targetType.lower() != "textgeneration":
        raise ConfigurationError(
            f"{document.place('targetType')}: targetType is '{metadata.targetType}'",
            "this environment serves text generation only: targetType: textgeneration",
        )
    _refuse_duplicates(document, metadata)
    return metadata, document.data, _unknown_keys(document)


def _first_error(document: YamlDocument, error: ValidationError) -> ConfigurationError:
    details = error.errors(include_url=False)
    # A union reports one error for each of its members: the first stands for all.
    first = details[0]
    keys = tuple(key for key in first["loc"] if not (isinstance(key, str) and key in _UNION_NAMES))
    name = ".".join(str(key) for key in keys)
    if first["type"] == "missing":
        problem = f"'{name}' is missing"
        if len(keys) == 1:
            problem += did_you_mean(str(keys[0]), (str(key) for key in document.data))
    elif first["type"] in _SHAPES:
        problem = f"{name} has to be {_SHAPES[first['type']]}"
    else:
        problem = f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return ConfigurationError(f"{document.place(*keys)}: {problem}")


_SHAPES = {"tuple_type": "a list", "model_type": "a mapping of keys to values", "string_type": "text"}
_UNION_NAMES = frozenset({"str", "bool", "int", "float", "dict[str,any]", "list[any]"})


def _refuse_duplicates(document: YamlDocument, metadata: Metadata) -> None:
    seen: set[str] = set()
    for index, definition in enumerate(metadata.runtimeParameterDefinitions):
        if definition.fieldName in seen:
            place = document.place("runtimeParameterDefinitions", index, "fieldName")
            raise ConfigurationError(f"{place}: parameter '{definition.fieldName}' is defined twice")
        seen.add(definition.fieldName)


def _unknown_keys(document: YamlDocument) -> tuple[str, ...]:
    """The incumbent rejects unknown keys; we say what was probably meant and go on."""
    warnings = [
        f"{document.place(key)}: unknown key '{key}' is ignored{did_you_mean(str(key), Metadata.model_fields)}"
        for key in document.data
        if key not in Metadata.model_fields
    ]
    for index, definition in enumerate(document.data.get("runtimeParameterDefinitions") or ()):
        warnings += [
            f"{document.place('runtimeParameterDefinitions', index, key)}: unknown key '{key}' is ignored"
            f"{did_you_mean(str(key), ParameterDefinition.model_fields)}"
            for key in definition
            if key not in ParameterDefinition.model_fields
        ]
    return tuple(warnings)
