"""`--dry-run`: every call is shown and none is sent. Answers are made up: what has to be there is, nothing else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, cast
from urllib.parse import urlencode

import requests
from datarobot.utils import to_api
from requests_toolbelt import MultipartEncoder

_SECRET_NAME = re.compile(r"key|token|secret|password|connection|private", re.IGNORECASE)
_PAST = "2000-01-01T00:00:00Z"
_HIDDEN = "***"
_PARTS = frozenset({"buildLog", "dependencyBuild", "tail", "log"})  # of one thing, though the path ends in a word


class Rehearsal:
    """Shows calls by `show`. `existing`: collections in which what is looked for is found, else under `name`."""

    def __init__(
        self, show: Callable[[str], None], existing: frozenset[str] = frozenset(), name: str = "<name>"
    ) -> None:
        self._show = show
        self._existing = set(existing)
        self._name = name

    def answer(self, method: str, path: str, params: Any, body: object) -> requests.Response:
        query = urlencode(cast(dict[str, Any], to_api(params)), doseq=True) if params else ""
        self._show(f"{method} {path}{'?' + query if query else ''}")
        for line in _lines(body):
            self._show(f"    {line}")
        response = requests.Response()
        response.status_code = 200
        response.headers["Content-Type"] = "application/json"
        response.headers["Location"] = "status/<job>/"
        response._content = json.dumps(self._invent(method, path.strip("/").split("/"), params or {})).encode()
        return response

    def _invent(self, method: str, path: list[str], params: Mapping[str, Any]) -> dict[str, Any]:
        collection = path[-1]
        listed = len(path) % 2 == 1 and collection not in _PARTS
        if method == "GET" and listed:
            name = next((params[key] for key in ("searchFor", "search") if params.get(key)), self._name)
            there = collection in self._existing
            return {"data": [self._thing(path, name)] if there else [], "next": None}
        if method == "POST":
            self._existing.add(collection)  # the SDK lists some of what it has just made
        return self._thing(path, self._name)

    def _thing(self, path: list[str], name: str) -> dict[str, Any]:
        """Something of the kind that the path names, with every field that the SDK insists on."""
        kinds = {
            "executionEnvironments": "environment", "customModels": "model", "registeredModels": "registered model",
            "deployments": "deployment", "customModelTests": "test", "versions": "version", "bundles": "bundle",
            "modelPackages": "registered version",
        }  # fmt: skip
        words = [word for word in path if word in kinds]
        kind = kinds[words[-1]] if words else "job"
        made = len(path) % 2 == 0 and path[-2] == (words[-1] if words else "") and "from" not in path[-1]
        return {
            "id": path[-1] if made else f"<{kind}>", "name": name, "label": name,
            "description": "made up", "status": "active" if kind == "deployment" else "completed",
            "created": _PAST, "updated": _PAST, "createdBy": "<you>", "language": "", "targetType": "TextGeneration",
            "customModelType": "inference", "trainingDataAssignmentInProgress": False, "environmentId": "<environment>",
            "buildStatus": "success", "imageId": "<image>", "log": "", "error": "", "customModelId": "<model>",
            "versionMajor": 1, "versionMinor": 0, "isFrozen": False, "items": [], "dependencies": [],
            "latestSuccessfulVersion": _built() if kind == "environment" else None, "deploymentsCount": 0,
            "latestVersion": self._thing([*path, "<model>", "versions"], name) if kind == "model" else None,
            "customModelImageId": "<version>", "imageType": "customModelVersion", "overallStatus": "succeeded",
            "testingStatus": {
                check: {"status": "succeeded", "message": ""}
                for check in ("errorCheck", "nullValueImputation", "longRunningService", "sideEffects")
            },
            "cpuCount": 1.0, "memoryBytes": 1, "gpuMemoryBytes": 1, "useCases": [], "hasGpu": True,
            **(_registered(name) if kind.startswith("registered") else {}),
        }  # fmt: skip


def _built() -> dict[str, Any]:
    ids = {"id": "<environment version>", "environmentId": "<environment>", "imageId": "<image>"}
    return {**ids, "buildStatus": "success"}


def _registered(name: str) -> dict[str, Any]:
    empty: dict[str, Any] = {
        key: {} for key in ("importMeta", "sourceMeta", "modelKind", "modelDescription", "datasets", "timeseries")
    }
    return {
        **empty, "registeredModelId": "<registered model>", "registeredModelVersion": 1, "modelId": "<version>",
        "modelExecutionType": "custom_inference_model", "isArchived": False, "isDeprecated": False, "permissions": [],
        "activeDeploymentCount": 0, "buildStatus": "complete", "target": {"name": name, "type": "TextGeneration"},
        "createdAt": _PAST, "modifiedAt": _PAST, "lastVersionNum": 1, "createdBy": {},
    }  # fmt: skip


def _lines(body: object) -> list[str]:
    if body is None or body == {}:
        return []
    if not isinstance(body, MultipartEncoder):
        return [json.dumps(body, ensure_ascii=False)]
    fields = body.fields.items() if isinstance(body.fields, dict) else body.fields
    return [f"{name}: {_field(name, value)}" for name, value in fields]


def _field(name: str, value: object) -> str:
    if isinstance(value, tuple):
        return f"{value[0]} ({os.fstat(value[1].fileno()).st_size:,} bytes)"
    if name == "runtimeParameterValues":
        given = json.loads(str(value))
        return json.dumps([_without_secret(item) for item in given], ensure_ascii=False)
    return str(value)


def _without_secret(item: dict[str, Any]) -> dict[str, Any]:
    """A credential's value is its id; a text may be a secret that should have been a credential."""
    secret = item["type"] == "string" and _SECRET_NAME.search(item["fieldName"])
    return {**item, "value": _HIDDEN} if secret else item
