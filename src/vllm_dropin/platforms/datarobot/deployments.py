"""`push deploy`: a version of a custom model registered by name, and a deployment that serves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datarobot.models.custom_model_version import CustomModelVersion
from datarobot.models.deployment.deployment import Deployment
from datarobot.models.model_registry.registered_model import RegisteredModel
from datarobot.models.model_registry.registered_model_version import RegisteredModelVersion

from vllm_dropin.errors import PlatformError
from vllm_dropin.platforms.datarobot.client import explained
from vllm_dropin.platforms.datarobot.models import find as find_model
from vllm_dropin.platforms.datarobot.platform import Platform, only

_FAILED = ("error", "abort", "fail")


@dataclass(frozen=True)
class DeploymentWish:
    """What there should be. `version`: of the custom model; None takes its latest."""

    model: str
    label: str
    registered_name: str
    model_id: str | None = None
    version: str | None = None
    id: str | None = None
    registered_id: str | None = None
    prediction_environment: str | None = None
    prediction_server: str | None = None
    importance: str | None = None
    replace: bool = False


def push(platform: Platform, wish: DeploymentWish) -> tuple[RegisteredModelVersion, Deployment]:
    """Register the version and deploy it. Raises PlatformError when the name serves another version already."""
    version = _version(wish)
    registered = _register(platform, wish, version)
    deployment = _find(wish)
    if deployment is None:
        deployment = _create(platform, wish, registered)
    else:
        serves = deployment.model_package["id"] if deployment.model_package else None
        platform.say(f"deployment {deployment.label!r} is there: {deployment.id}")
        if serves != registered.id:
            _replace(platform, wish, deployment, registered)
    return registered, _until_active(platform, deployment.id)


def _version(wish: DeploymentWish) -> str:
    model = find_model(wish.model, wish.model_id)
    if model is None:
        raise PlatformError(f"there is no model called {wish.model!r}", "Push it first: vllm-dropin push model.")
    if wish.version:
        with explained("looking for the model's version"):
            return CustomModelVersion.get(model.id, wish.version).id
    if model.latest_version is None:
        raise PlatformError(f"the model {model.name!r} ({model.id}) has no version", "Push it: vllm-dropin push model.")
    return str(model.latest_version.id)


def _register(platform: Platform, wish: DeploymentWish, version: str) -> RegisteredModelVersion:
    """The registered version of this version: the one that is there, else a new one."""
    registered: RegisteredModel | None
    if wish.registered_id:
        with explained(f"looking for the registered model {wish.registered_id}"):
            registered = RegisteredModel.get(wish.registered_id)
    else:
        name = wish.registered_name
        with explained("listing registered models"):
            found = [item for item in RegisteredModel.list(search=name) if item.name == name and not item.is_archived]
        registered = only("registered model", name, found, "--registered-id")
    known = None
    if registered is not None:
        with explained("listing registered versions"):
            known = next((item for item in registered.list_versions() if item.model_id == version), None)
    if known is None:
        target: dict[str, Any] = (
            {"registered_model_id": registered.id} if registered else {"registered_model_name": wish.registered_name}
        )
        with explained(f"registering version {version}"):
            known = RegisteredModelVersion.create_for_custom_model_version(version, **target)
        platform.say(f"registered as version {known.registered_model_version} of {wish.registered_name!r}: {known.id}")
    else:
        platform.say(f"registered already: version {known.registered_model_version}, {known.id}")
    return _until_built(platform, known)


def _until_built(platform: Platform, version: RegisteredModelVersion) -> RegisteredModelVersion:
    """The platform may build an image for a registered version; only then it can be deployed."""
    current = version

    def look() -> tuple[str, RegisteredModelVersion | None]:
        nonlocal current
        state = current.build_status or "complete"
        if state.lower() not in ("inprogress", "in_progress", "submitted", "processing"):
            return state, current
        with explained("asking how the registration goes"):
            answer = platform.client.get(f"registeredModels/{version.registered_model_id}/versions/{version.id}/")
            current = RegisteredModelVersion.from_server_data(answer.json())
        return current.build_status or "complete", None

    done = platform.wait("registration", look)
    if (done.build_status or "").lower().startswith(_FAILED):
        raise PlatformError(
            f"the build of the registered version {done.id} failed", "Its log is in the platform's registry."
        )
    return done


def _find(wish: DeploymentWish) -> Deployment | None:
    if wish.id:
        with explained(f"looking for the deployment {wish.id}"):
            return Deployment.get(wish.id)
    with explained("listing deployments"):
        found = [item for item in Deployment.list(search=wish.label) if item.label == wish.label]
    return only("deployment", wish.label, found, "--id")


def _create(platform: Platform, wish: DeploymentWish, registered: RegisteredModelVersion) -> Deployment:
    """The SDK's own method sleeps without a word; this one sends what it sends, and tells how it goes."""
    body = {
        "model_package_id": registered.id, "label": wish.label,
        "prediction_environment_id": wish.prediction_environment,
        "default_prediction_server_id": wish.prediction_server, "importance": wish.importance,
    }  # fmt: skip
    remedy = "Name --prediction-environment or --prediction-server where the platform asks for one."
    with explained(f"creating the deployment {wish.label!r}", {422: remedy}):
        answer = platform.client.post("deployments/fromModelPackage/", data=body)
        identifier, location = str(answer.json()["id"]), str(answer.headers["Location"])
    platform.say(f"deployment {wish.label!r} created: {identifier}")
    _finish(platform, "deployment", location)
    with explained("looking at the deployment"):
        return Deployment.get(identifier)


def _replace(
    platform: Platform, wish: DeploymentWish, deployment: Deployment, registered: RegisteredModelVersion
) -> None:
    if not wish.replace:
        raise PlatformError(
            f"the deployment {deployment.label!r} ({deployment.id}) serves another version of a model",
            "Say --replace to change what it serves, or deploy under another --label.",
        )
    with explained("replacing what the deployment serves"):
        answer = platform.client.patch(
            f"deployments/{deployment.id}/model/", data={"modelPackageId": registered.id, "reason": "OTHER"}
        )
        location = str(answer.headers["Location"])
    _finish(platform, "replacement", location)


def _finish(platform: Platform, what: str, location: str) -> None:
    """Wait for a job of the platform: it answers with its state, and with a redirect when it is done."""

    def look() -> tuple[str, bool | None]:
        with explained(f"asking how the {what} goes"):
            answer = platform.client.get(location, allow_redirects=False)
            if answer.status_code == 303:
                return "completed", True
            job = answer.json()
            state = str(job["status"])
        if state.lower().startswith(_FAILED):
            raise PlatformError(f"the {what} failed: {job.get('message') or state}", "Correct it and push again.")
        return state, True if state.lower() == "completed" else None

    platform.wait(what, look)


def _until_active(platform: Platform, identifier: str) -> Deployment:
    """Until it serves. One that somebody has switched off stays so, and is told of."""

    def look() -> tuple[str, Deployment | None]:
        with explained("looking at the deployment"):
            deployment = Deployment.get(identifier)
        state = deployment.status or "active"
        moving = state in ("launching", "starting", "replacingModel", "activating")
        return state, None if moving and not platform.rehearsing else deployment

    deployment = platform.wait("deployment", look)
    if (deployment.status or "").lower().startswith(_FAILED):
        raise PlatformError(
            f"the deployment {identifier} ended as {deployment.status}", "Its log is on the deployment's page."
        )
    return deployment
