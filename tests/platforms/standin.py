"""The platform's API, as far as `push` goes and as the SDK's source implies it, over real HTTP and strict.

Each route checks method, path, query, authorization and body: what it does not know is a 404, 405 or 422 in the
platform's form, and an entry of `complaints` that fails the test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import policy
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.serving import serving

TOKEN = "push-token-canary-4711"
PREFIX = "/api/v2/"
TIME = "2024-05-01T10:00:00.000000Z"
_ID = r"([0-9a-f]{24})"
Json = dict[str, Any]


class Refuse(Exception):
    def __init__(self, status: int, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, {"message": message, **more}


@dataclass
class Call:
    """One request. `form` are the fields of a multipart body, in order; files as (name, content)."""

    method: str
    path: str
    query: dict[str, str]
    body: Json | None = None
    form: list[tuple[str, Any]] = field(default_factory=list)
    shown: str = ""

    def require(self, required: Mapping[str, type], optional: Mapping[str, type] | None = None) -> Json:
        """The JSON body, with exactly these fields."""
        known = {**required, **(optional or {})}
        if self.body is None:
            raise Refuse(422, "a JSON body is needed")
        errors = {name: "is required" for name in required if name not in self.body}
        errors |= {name: f"{name} is not allowed key" for name in self.body if name not in known}
        errors |= {
            name: f"value is not {known[name].__name__}"
            for name, value in self.body.items()
            if name in known and not isinstance(value, known[name])
        }
        if errors:
            raise Refuse(422, "Invalid field data", errors=errors)
        return self.body

    def fields(self, known: set[str]) -> dict[str, list[Any]]:
        """The multipart fields, all of them known."""
        if not self.form:
            raise Refuse(422, "a multipart body is needed")
        strangers = {name for name, _ in self.form} - known
        if strangers:
            raise Refuse(422, "Invalid field data", errors=dict.fromkeys(strangers, "not allowed"))
        found: dict[str, list[Any]] = {}
        for name, value in self.form:
            found.setdefault(name, []).append(value)
        return found


class StandIn:
    """What the platform knows. The lists of states are what a build, a test or a job goes through, one a look."""

    def __init__(self) -> None:
        self._ids = (f"{number:024x}" for number in count(0xA0))
        self.calls: list[Call] = []
        self.complaints: list[str] = []
        self.environments: list[Json] = []
        self.environment_versions: dict[str, list[Json]] = {}
        self.models: list[Json] = []
        self.versions: dict[str, list[Json]] = {}
        self.tests: list[Json] = []
        self.registered: list[Json] = []
        self.packages: list[Json] = []
        self.deployments: list[Json] = []
        self.jobs: dict[str, tuple[list[str], str]] = {}
        self.bundles = [self._bundle("cpu.small", False), self._bundle("gpu.large", True)]
        self.build_states = ["submitted", "processing", "processing", "success"]
        self.build_log = ["Step 1/3 : FROM base", "Step 2/3 : COPY", "Step 3/3 : done"]
        self.build_error = ""
        self.dependency_states = ["submitted", "processing", "success"]
        self.dependency_builds: dict[str, list[str]] = {}
        self.test_states = ["in_progress", "in_progress", "succeeded"]
        self.job_states = ["INITIALIZED", "RUNNING", "COMPLETED"]
        self.package_states = ["inProgress", "complete"]
        self.refusals: dict[tuple[str, str], Refuse] = {}
        self.fail_once: list[tuple[str, str, int]] = []
        """(method, pattern of the path, status): answered once, before anything is done."""
        self.cut_after: Callable[[Call], bool] | None = None
        """After such a call has been done the connection is closed without an answer."""
        self.port = 0
        self.named = ""
        """The origin that links in answers begin with: a platform behind a proxy may not know its own name."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/api/v2"

    def new_id(self) -> str:
        return next(self._ids)

    def sent(self, method: str, pattern: str) -> list[Call]:
        return [call for call in self.calls if call.method == method and re.fullmatch(pattern, call.path)]

    # What it makes

    @staticmethod
    def _bundle(name: str, gpu: bool) -> Json:
        return {
            "id": name.replace(".", "-"), "name": name, "description": f"{name} machine", "cpuCount": 4.0,
            "memoryBytes": 1 << 34, "gpuMemoryBytes": (1 << 36) * gpu, "gpuCount": float(gpu),
            "useCases": ["customModel"], "hasGpu": gpu, "isDefault": not gpu, "isDeleted": False,
        }  # fmt: skip

    def add_environment(self, name: str, **more: Any) -> Json:
        made = {
            "id": self.new_id(), "name": name, "description": None, "programmingLanguage": "python", "isPublic": False,
            "created": TIME, "useCases": ["customModel"], "requiredMetadataKeys": [], **more,
        }  # fmt: skip
        self.environments.append(made)
        self.environment_versions[made["id"]] = []
        return made

    def add_environment_version(self, environment: str, states: list[str], **more: Any) -> Json:
        made = {
            "id": self.new_id(), "environmentId": environment, "buildStatus": states[0], "imageId": self.new_id(),
            "label": None, "description": None, "created": TIME, "dockerContextSize": 1,
            "_states": list(states), **more,
        }  # fmt: skip
        self.environment_versions[environment].insert(0, made)
        return made

    def add_model(self, name: str, target_type: str = "TextGeneration", **more: Any) -> Json:
        made = {
            "id": self.new_id(), "name": name, "description": "", "targetType": target_type,
            "customModelType": "inference",
            "supportsBinaryClassification": False, "supportsRegression": False, "createdBy": "me", "updated": TIME,
            "created": TIME, "deploymentsCount": 0, "language": "", "trainingDataAssignmentInProgress": False, **more,
        }  # fmt: skip
        self.models.append(made)
        self.versions[made["id"]] = []
        return made

    def add_version(self, model: str, **more: Any) -> Json:
        made = {
            "id": self.new_id(), "customModelId": model, "versionMajor": len(self.versions[model]) + 1,
            "versionMinor": 0, "isFrozen": False, "items": [], "created": TIME, "description": None, "label": "v",
            "dependencies": [], "runtimeParameters": [], **more,
        }  # fmt: skip
        self.versions[model].insert(0, made)
        return made

    def add_registered(self, name: str) -> Json:
        made = {
            "id": self.new_id(), "name": name, "description": "", "createdAt": TIME, "modifiedAt": TIME,
            "createdBy": {"id": "1"}, "target": {"name": "resultText", "type": "TextGeneration"}, "lastVersionNum": 0,
            "isArchived": False,
        }  # fmt: skip
        self.registered.append(made)
        return made

    def add_package(self, registered: Json, model_version: str, states: list[str] | None = None) -> Json:
        registered["lastVersionNum"] += 1
        empty: Json = {
            key: {} for key in ("importMeta", "sourceMeta", "modelKind", "modelDescription", "datasets", "timeseries")
        }
        states = list(self.package_states if states is None else states)
        made = {
            **empty, "id": self.new_id(), "registeredModelId": registered["id"], "name": registered["name"],
            "registeredModelVersion": registered["lastVersionNum"], "modelId": model_version, "isArchived": False,
            "modelExecutionType": "custom_inference_model", "target": registered["target"], "isDeprecated": False,
            "permissions": [], "activeDeploymentCount": 0, "buildStatus": states[0], "_states": states,
        }  # fmt: skip
        self.packages.append(made)
        return made

    def add_deployment(self, label: str, package: str, status: str = "active") -> Json:
        made = {
            "id": self.new_id(), "label": label, "description": None, "status": status,
            "modelPackage": {"id": package, "name": label}, "model": {"id": "1", "type": "custom"},
        }  # fmt: skip
        self.deployments.append(made)
        return made

    def _job(self, then: str) -> dict[str, str]:
        identifier = self.new_id()
        self.jobs[identifier] = (list(self.job_states), then)
        return {"Location": f"{self.named or f'http://127.0.0.1:{self.port}'}{PREFIX}status/{identifier}/"}

    # What it answers

    def answer(self, call: Call) -> tuple[int, dict[str, str], Any]:
        for method, pattern, handler in _ROUTES:
            match = re.fullmatch(pattern, call.path)
            if match and method == call.method:
                for (denied, where), refusal in self.refusals.items():
                    if denied == method and re.fullmatch(where, call.path):
                        raise refusal
                return handler(self, call, *match.groups())
        self.complaints.append(f"no such route: {call.method} {call.path}")
        raise Refuse(404, "Not Found")

    def pages(self, call: Call, items: list[Json], allowed: set[str]) -> tuple[int, dict[str, str], Any]:
        """Lists come two a page, with an absolute link to the next."""
        strangers = set(call.query) - allowed - {"offset", "limit"}
        if strangers:
            raise Refuse(422, "Invalid field data", errors=dict.fromkeys(strangers, "not allowed"))
        offset = int(call.query.get("offset", 0))
        rest = "&".join(f"{name}={value}" for name, value in call.query.items() if name != "offset")
        origin = self.named or f"http://127.0.0.1:{self.port}"
        more = f"{origin}{PREFIX}{call.path}?{rest}&offset={offset + 2}" if offset + 2 < len(items) else None
        page = [_public(item) for item in items[offset : offset + 2]]
        return 200, {}, {"count": len(page), "data": page, "next": more, "previous": None}

    def list_environments(self, call: Call) -> Any:
        word = call.query.get("searchFor", "")
        return self.pages(
            call, [self._environment(item) for item in self.environments if word in item["name"]], {"searchFor"}
        )

    def create_environment(self, call: Call) -> Any:
        body = call.require(
            {"name": str, "programmingLanguage": str, "useCases": list}, {"description": str, "isPublic": bool}
        )
        return 201, {}, {"id": self.add_environment(**body)["id"]}

    def _environment(self, item: Json) -> Json:
        versions = self.environment_versions[item["id"]]
        built = [_public(version) for version in versions if version["buildStatus"] == "success"]
        latest = {"latestVersion": _public(versions[0])} if versions else {}
        return {**item, **latest, **({"latestSuccessfulVersion": built[0]} if built else {})}

    def get_environment(self, call: Call, identifier: str) -> Any:
        return 200, {}, self._environment(_by_id(self.environments, identifier))

    def list_environment_versions(self, call: Call, identifier: str) -> Any:
        _by_id(self.environments, identifier)
        return self.pages(call, self.environment_versions[identifier], {"buildStatus"})

    def create_environment_version(self, call: Call, identifier: str) -> Any:
        _by_id(self.environments, identifier)
        form = call.fields({"label", "description", "docker_context"})
        name, content = form["docker_context"][0]
        if not re.search(r"\.(zip|tar|tar\.gz|tgz)$", name) or not content:
            raise Refuse(422, "docker context has to be an archive")
        if len(form.get("label", [""])[0]) > 50:
            raise Refuse(422, "label is too long")
        made = self.add_environment_version(
            identifier, self.build_states, label=form.get("label", [None])[0], description=form["description"][0],
            dockerContextSize=len(content),
        )  # fmt: skip
        return 202, {}, {"id": made["id"]}

    def get_environment_version(self, call: Call, environment: str, identifier: str) -> Any:
        version = _by_id(self.environment_versions[environment], identifier)
        version["buildStatus"] = _next(version["_states"])
        return 200, {}, _public(version)

    def get_build_log(self, call: Call, environment: str, identifier: str) -> Any:
        version = _by_id(self.environment_versions[environment], identifier)
        if version["buildStatus"] == "submitted":
            raise Refuse(404, "No build log")
        whole = version["buildStatus"] != "processing"
        lines = self.build_log if whole else self.build_log[:1]
        return 200, {}, {"log": "\n".join(lines), "error": self.build_error if whole else ""}

    def list_bundles(self, call: Call) -> Any:
        if call.query.get("useCases") != "customModel":
            raise Refuse(422, "useCases")
        return self.pages(call, self.bundles, {"useCases"})

    def list_models(self, call: Call) -> Any:
        if call.query.get("customModelType") != "inference":
            raise Refuse(422, "customModelType")
        word = call.query.get("searchFor", "")
        found = [self._model(item) for item in self.models if word in item["name"]]
        return self.pages(call, found, {"customModelType", "searchFor", "isDeployed", "orderBy"})

    def _model(self, item: Json) -> Json:
        versions = self.versions[item["id"]]
        return {**item, "latestVersion": _public(versions[0]) if versions else None}

    def get_model(self, call: Call, identifier: str) -> Any:
        return 200, {}, self._model(_by_id(self.models, identifier))

    def create_model(self, call: Call) -> Any:
        body = call.require(
            {"customModelType": str, "name": str, "targetType": str, "targetName": str}, {"description": str}
        )
        if (body["customModelType"], body["targetType"]) != ("inference", "TextGeneration"):
            raise Refuse(422, "Invalid field data", errors={"targetType": "unexpected"})
        more = {"targetName": body["targetName"], "description": body.get("description", "")}
        return 201, {}, self._model(self.add_model(body["name"], body["targetType"], **more))

    def list_versions(self, call: Call, identifier: str) -> Any:
        _by_id(self.models, identifier)
        return self.pages(call, self.versions[identifier], set())

    def create_version(self, call: Call, identifier: str) -> Any:
        _by_id(self.models, identifier)
        form = call.fields({
            "isMajorUpdate", "baseEnvironmentId", "baseEnvironmentVersionId", "file", "filePath", "networkEgressPolicy",
            "maximumMemory", "replicas", "runtimeParameterValues",
        })  # fmt: skip
        if form["isMajorUpdate"] != ["True"]:
            raise Refuse(422, "isMajorUpdate")
        environment = _by_id(self.environments, form["baseEnvironmentId"][0])
        _by_id(self.environment_versions[environment["id"]], form["baseEnvironmentVersionId"][0])
        files, paths = form.get("file", []), form.get("filePath", [])
        if len(files) != len(paths) or len(set(paths)) != len(paths):
            raise Refuse(422, "each file needs a path")
        order = [name for name, _ in call.form if name in ("file", "filePath")]
        if order != ["file", "filePath"] * len(files):
            raise Refuse(422, "a file's path has to follow it")
        if form.get("networkEgressPolicy", ["NONE"])[0] not in ("NONE", "PUBLIC"):
            raise Refuse(422, "networkEgressPolicy")
        parameters = json.loads(form.get("runtimeParameterValues", ["[]"])[0])
        for item in parameters:
            if set(item) != {"fieldName", "type", "value"}:
                raise Refuse(422, "runtimeParameterValues")
            if item["type"] == "credential" and not re.fullmatch(_ID, item["value"]):
                raise Refuse(422, "runtimeParameterValues: a credential is given by its id")
        lines = next((text for (_, text), path in zip(files, paths, strict=True) if path == "requirements.txt"), b"")
        dependencies = [
            {"packageName": line, "constraints": [], "line": line, "lineNumber": number}
            for number, line in enumerate(lines.decode().split(), 1)
        ]
        made = self.add_version(
            identifier, dependencies=dependencies, baseEnvironmentId=environment["id"],
            items=[
                {"id": self.new_id(), "fileName": path.rpartition("/")[2], "filePath": path, "fileSource": "Local"}
                for path in paths
            ],
        )  # fmt: skip
        return 201, {}, _public(made)

    def change_version(self, call: Call, identifier: str) -> Any:
        """A version like the latest, with other settings."""
        body = call.require(
            {"isMajorUpdate": str, "baseEnvironmentId": str, "baseEnvironmentVersionId": str, "resourceBundleId": str}
        )
        if body["isMajorUpdate"] != "false":
            raise Refuse(422, "isMajorUpdate")
        if body["resourceBundleId"] not in [bundle["id"] for bundle in self.bundles]:
            raise Refuse(422, "resourceBundleId")
        latest = self.versions[identifier][0]
        made = {
            **latest, "id": self.new_id(), "versionMinor": latest["versionMinor"] + 1, "description": None,
            "resourceBundleId": body["resourceBundleId"],
        }  # fmt: skip
        self.versions[identifier].insert(0, made)
        return 201, {}, _public(made)

    def get_version(self, call: Call, model: str, identifier: str) -> Any:
        return 200, {}, _public(_by_id(self.versions[model], identifier))

    def describe_version(self, call: Call, model: str, identifier: str) -> Any:
        version = _by_id(self.versions[model], identifier)
        version["description"] = call.require({"description": str})["description"]
        return 200, {}, _public(version)

    def get_dependency_build(self, call: Call, model: str, identifier: str) -> Any:
        if identifier not in self.dependency_builds:
            raise Refuse(404, "No build")
        return 200, {}, {"buildStatus": _next(self.dependency_builds[identifier]), "buildStart": TIME, "buildEnd": ""}

    def start_dependency_build(self, call: Call, model: str, identifier: str) -> Any:
        self.dependency_builds[identifier] = list(self.dependency_states)
        return 202, {}, {"buildStatus": "submitted", "buildStart": TIME, "buildEnd": ""}

    def get_dependency_log(self, call: Call, model: str, identifier: str) -> Any:
        return 200, {"Content-Type": "text/plain"}, "no matching distribution for nonsense"

    def list_tests(self, call: Call) -> Any:
        found = [self._test(test) for test in self.tests if test["_model"] == call.query.get("customModelId")]
        return self.pages(call, found, {"customModelId"})

    def create_test(self, call: Call) -> Any:
        body = call.require({"customModelId": str, "customModelVersionId": str}, {"datasetId": str})
        _by_id(self.versions[body["customModelId"]], body["customModelVersionId"])
        dataset = {"datasetId": body["datasetId"]} if "datasetId" in body else {}
        made = {
            "id": self.new_id(), "customModelImageId": body["customModelVersionId"], "imageType": "customModelVersion",
            "overallStatus": self.test_states[0], "createdBy": "me", "created": TIME, **dataset,
            "_states": list(self.test_states), "_model": body["customModelId"],
        }  # fmt: skip
        self.tests.insert(0, made)
        return 202, self._job(f"customModelTests/{made['id']}/"), self._test(made)

    def _test(self, test: Json) -> Json:
        state = test["overallStatus"]
        checks = ("errorCheck", "nullValueImputation", "longRunningService", "sideEffects")
        message = "the server did not start" if state == "failed" else ""
        return {**_public(test), "testingStatus": {name: {"status": state, "message": message} for name in checks}}

    def get_test(self, call: Call, identifier: str) -> Any:
        test = _by_id(self.tests, identifier)
        test["overallStatus"] = _next(test["_states"])
        return 200, {}, self._test(test)

    def get_test_tail(self, call: Call, identifier: str) -> Any:
        return 200, {"Content-Type": "text/plain"}, "CUDA out of memory\x1b[31m"

    def list_registered(self, call: Call) -> Any:
        word = call.query.get("search", "")
        return self.pages(call, [item for item in self.registered if word in item["name"]], {"search"})

    def get_registered(self, call: Call, identifier: str) -> Any:
        return 200, {}, _by_id(self.registered, identifier)

    def list_packages(self, call: Call, identifier: str) -> Any:
        return self.pages(call, [item for item in self.packages if item["registeredModelId"] == identifier], set())

    def get_package(self, call: Call, registered: str, identifier: str) -> Any:
        package = _by_id(self.packages, identifier)
        package["buildStatus"] = _next(package["_states"])
        return 200, {}, _public(package)

    def create_package(self, call: Call) -> Any:
        body = call.require({"customModelVersionId": str}, {"registeredModelName": str, "registeredModelId": str})
        if ("registeredModelName" in body) == ("registeredModelId" in body):
            raise Refuse(422, "one of registeredModelName and registeredModelId")
        if "registeredModelId" in body:
            registered = _by_id(self.registered, body["registeredModelId"])
        else:
            if any(item["name"] == body["registeredModelName"] for item in self.registered):
                raise Refuse(409, "a registered model of that name exists")
            registered = self.add_registered(body["registeredModelName"])
        return 201, {}, _public(self.add_package(registered, body["customModelVersionId"]))

    def list_deployments(self, call: Call) -> Any:
        word = call.query.get("search", "")
        return self.pages(call, [item for item in self.deployments if word in item["label"]], {"search"})

    def get_deployment(self, call: Call, identifier: str) -> Any:
        return 200, {}, _by_id(self.deployments, identifier)

    def create_deployment(self, call: Call) -> Any:
        body = call.require(
            {"modelPackageId": str, "label": str},
            {"predictionEnvironmentId": str, "defaultPredictionServerId": str, "importance": str},
        )
        package = _by_id(self.packages, body["modelPackageId"])
        if package["buildStatus"] != "complete":
            raise Refuse(422, "the model package is not built")
        made = self.add_deployment(body["label"], package["id"], "launching")
        return 202, self._job(f"deployments/{made['id']}/"), {"id": made["id"]}

    def replace(self, call: Call, identifier: str) -> Any:
        body = call.require({"modelPackageId": str, "reason": str})
        deployment = _by_id(self.deployments, identifier)
        deployment["modelPackage"] = {"id": _by_id(self.packages, body["modelPackageId"])["id"]}
        deployment["status"] = "replacingModel"
        return 202, self._job(f"deployments/{identifier}/"), {}

    def get_job(self, call: Call, identifier: str) -> Any:
        states, then = self.jobs[identifier]
        state = _next(states)
        if state != "COMPLETED":
            return (
                200,
                {},
                {"status": state, "message": "no GPU is free" if state == "ERROR" else "", "statusId": identifier},
            )
        for deployment in self.deployments:
            if then == f"deployments/{deployment['id']}/":
                deployment["status"] = "active"
        return 303, {"Location": f"{self.named or f'http://127.0.0.1:{self.port}'}{PREFIX}{then}"}, {}

    @contextmanager
    def serving(self) -> Iterator[StandIn]:
        server = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        server.daemon_threads = True
        self.port = server.server_port
        with serving(server):
            yield self


_V = rf"executionEnvironments/{_ID}/versions/"
_M = rf"customModels/{_ID}/versions/"
_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "executionEnvironments/", StandIn.list_environments),
    ("POST", "executionEnvironments/", StandIn.create_environment),
    ("GET", f"executionEnvironments/{_ID}/", StandIn.get_environment),
    ("GET", _V, StandIn.list_environment_versions),
    ("POST", _V, StandIn.create_environment_version),
    ("GET", f"{_V}{_ID}/", StandIn.get_environment_version),
    ("GET", f"{_V}{_ID}/buildLog/", StandIn.get_build_log),
    ("GET", "mlops/compute/bundles/", StandIn.list_bundles),
    ("GET", "customModels/", StandIn.list_models),
    ("POST", "customModels/", StandIn.create_model),
    ("GET", f"customModels/{_ID}/", StandIn.get_model),
    ("GET", _M, StandIn.list_versions),
    ("POST", _M, StandIn.create_version),
    ("PATCH", _M, StandIn.change_version),
    ("GET", f"{_M}{_ID}/", StandIn.get_version),
    ("PATCH", f"{_M}{_ID}/", StandIn.describe_version),
    ("GET", f"{_M}{_ID}/dependencyBuild/", StandIn.get_dependency_build),
    ("POST", f"{_M}{_ID}/dependencyBuild/", StandIn.start_dependency_build),
    ("GET", f"{_M}{_ID}/dependencyBuildLog/", StandIn.get_dependency_log),
    ("GET", "customModelTests/", StandIn.list_tests),
    ("POST", "customModelTests/", StandIn.create_test),
    ("GET", f"customModelTests/{_ID}/", StandIn.get_test),
    ("GET", f"customModelTests/{_ID}/tail/", StandIn.get_test_tail),
    ("GET", "registeredModels/", StandIn.list_registered),
    ("GET", f"registeredModels/{_ID}/", StandIn.get_registered),
    ("GET", f"registeredModels/{_ID}/versions/", StandIn.list_packages),
    ("GET", f"registeredModels/{_ID}/versions/{_ID}/", StandIn.get_package),
    ("POST", "modelPackages/fromCustomModelVersion/", StandIn.create_package),
    ("GET", "deployments/", StandIn.list_deployments),
    ("POST", "deployments/fromModelPackage/", StandIn.create_deployment),
    ("GET", f"deployments/{_ID}/", StandIn.get_deployment),
    ("PATCH", f"deployments/{_ID}/model/", StandIn.replace),
    ("GET", f"status/{_ID}/", StandIn.get_job),
]


def _next(states: list[str]) -> str:
    return states.pop(0) if len(states) > 1 else states[0]


def _public(item: Json) -> Json:
    return {name: value for name, value in item.items() if not name.startswith("_")}


def _by_id(items: list[Json], identifier: str) -> Json:
    for item in items:
        if item["id"] == identifier:
            return item
    raise Refuse(404, f"{identifier} was not found")


def _form(content_type: str, body: bytes) -> list[tuple[str, Any]]:
    parser = BytesParser(policy=policy.HTTP)
    message = parser.parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    fields: list[tuple[str, Any]] = []
    for part in message.iter_parts():
        name, file = part.get_param("name", header="content-disposition"), part.get_filename()
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        fields.append((str(name), (file, content) if file is not None else content.decode()))
    return fields


def _handler(platform: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # one packet an answer: with two, each call would wait 40 ms for an acknowledgement

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            url = urlsplit(self.path)
            call = Call(self.command, url.path.removeprefix(PREFIX), dict(parse_qsl(url.query)))
            platform.calls.append(call)
            try:
                status, headers, answer = self.decide(call, url.path, body)
            except Refuse as refused:
                status, headers, answer = refused.status, {}, refused.body
                if status in (405, 422) and not platform.refusals:
                    platform.complaints.append(f"{call.method} {call.path}: {refused.body}")
            if platform.cut_after is not None and platform.cut_after(call):
                self.close_connection = True
                self.connection.close()
                return
            text = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                **headers,
                "Content-Length": str(len(text)),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def decide(self, call: Call, path: str, body: bytes) -> tuple[int, dict[str, str], Any]:
            if not path.startswith(PREFIX):
                raise Refuse(404, "Not Found")
            if self.headers.get("Authorization") != f"Token {TOKEN}":
                raise Refuse(401, "Invalid Authorization header. No credentials provided.")
            for once in platform.fail_once:
                if once[0] == call.method and re.fullmatch(once[1], call.path):
                    platform.fail_once.remove(once)
                    return once[2], {"Content-Type": "text/html"}, "<h1>\u00fcber capacity</h1>"
            kind = self.headers.get("Content-Type") or ""
            if kind.startswith("multipart/form-data"):
                call.form = _form(kind, body)
            elif body:
                if kind != "application/json":
                    raise Refuse(422, f"Content-Type {kind}")
                call.body = json.loads(body)
            return platform.answer(call)

        do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = handle_one

        def log_message(self, *args: object) -> None:
            pass

    return Handler
