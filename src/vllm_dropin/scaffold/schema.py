"""The JSON Schema of model-metadata.yaml, for editors. Shipped beside the model that it is generated from.

python -m vllm_dropin.scaffold.schema    writes it anew
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_dropin import model
from vllm_dropin.model.contract import CONTRACT
from vllm_dropin.model.metadata import Metadata

SCHEMA_FILE = Path(model.__file__).with_name("model-metadata.schema.json")

_MEANINGS = {
    "name": "What the model is called.",
    "type": "Always inference.",
    "targetType": "Always textgeneration.",
    "runtimeParameterDefinitions": "The values that can be set for each deployment.",
    "fieldName": "Name of the parameter. custom.py reads it by this name; those listed here shape the service.",
    "defaultValue": "Used unless the deployment sets another. Not for credentials.",
    "allowEmpty": "Whether the parameter may stay without a value.",
    "credentialType": "Which kind of stored credential may be chosen, such as api_token, s3, gcp or azure.",
}


def metadata_schema() -> dict[str, Any]:
    """The schema, generated. Stricter than our reader in one point: unknown keys, which the platform refuses."""
    schema = Metadata.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        part["additionalProperties"] = False
        part.pop("description", None)  # the docstring is for our developers
        for name, field in part["properties"].items():
            field.pop("title", None)
            if name in _MEANINGS:
                field["description"] = _MEANINGS[name]
    schema["properties"]["type"]["const"] = "inference"
    # Its spelling is free: the platform's own examples have three.
    schema["properties"]["targetType"]["pattern"] = "^[Tt][Ee][Xx][Tt][Gg][Ee][Nn][Ee][Rr][Aa][Tt][Ii][Oo][Nn]$"
    names = [parameter.name for parameter in CONTRACT]
    schema["$defs"]["ParameterDefinition"]["properties"]["fieldName"]["examples"] = names
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema, "title": "vllm-dropin model metadata"}


def render() -> str:
    """The file's text."""
    return json.dumps(metadata_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(render(), encoding="utf-8")
