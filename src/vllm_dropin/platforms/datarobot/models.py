"""`push model`: a custom model by its name, a version of it with the folder's files, and the platform's test of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from datarobot.enums import TARGET_TYPE
from datarobot.models.custom_model import CustomInferenceModel
from datarobot.models.custom_model_test import CustomModelTest
from datarobot.models.custom_model_version import CustomModelVersion, CustomModelVersionDependencyBuild
from datarobot.models.execution_environment_version import ExecutionEnvironmentVersion
from datarobot.models.resource_bundle import ResourceBundle
from datarobot.models.runtime_parameters import RuntimeParameterValue

from vllm_dropin.errors import PlatformError
from vllm_dropin.platforms.datarobot.client import Refused, explained
from vllm_dropin.platforms.datarobot.contents import digest_json, digest_of
from vllm_dropin.platforms.datarobot.environments import find as find_environment
from vllm_dropin.platforms.datarobot.environments import printable
from vllm_dropin.platforms.datarobot.platform import Platform, has_mark, marked, only

_UPLOAD_SECONDS = 3600
_TAIL = 30


@dataclass(frozen=True)
class Resources:
    """What a version runs with; None leaves a choice to the platform."""

    bundle: str | None = None
    memory: int | None = None
    replicas: int | None = None
    egress: str | None = None


@dataclass(frozen=True)
class ModelWish:
    """What there should be. `parameters` are (type, value) by name; a credential's value is its id."""

    name: str
    files: Sequence[tuple[str, Path]]
    environment: str
    id: str | None = None
    environment_id: str | None = None
    environment_version: str | None = None
    description: str = ""
    target_name: str = "resultText"
    parameters: Mapping[str, tuple[str, str | float | bool | None]] | None = None
    resources: Resources = Resources()
    test: bool = True
    test_dataset: str | None = None


def push(platform: Platform, wish: ModelWish) -> tuple[CustomInferenceModel, CustomModelVersion]:
    """Create or find the model and the version with this content, build its dependencies, test it.

    Raises PlatformError when a build or the test fails.
    """
    environment_id, environment_version = _environment(wish)
    bundle = _bundle(wish.resources.bundle)
    model = find(wish.name, wish.id)
    if model is None:
        with explained(f"creating the model {wish.name!r}"):
            model = CustomInferenceModel.create(
                wish.name,
                TARGET_TYPE.TEXT_GENERATION,  # type: ignore[arg-type] # its members are plain texts
                wish.target_name,
                description=wish.description or None,
            )
        platform.say(f"model {wish.name!r} created: {model.id}")
    else:
        platform.say(f"model {model.name!r} is there: {model.id}")
    version = _version(platform, wish, model, environment_id, environment_version, bundle)
    if version.dependencies:
        _build_dependencies(platform, version)
    if wish.test:
        _test(platform, wish, version)
    return model, version


def find(name: str, identifier: str | None) -> CustomInferenceModel | None:
    """By id, else by exact name. Raises PlatformError as environments.find does, and for another kind of model."""
    if identifier:
        with explained(f"looking for the model {identifier}"):
            model: CustomInferenceModel | None = CustomInferenceModel.get(identifier)
    else:
        with explained("listing models"):
            found = [item for item in CustomInferenceModel.list(search_for=name) if item.name == name]
        model = only("model", name, found, "--id")
    if model is not None and model.target_type != TARGET_TYPE.TEXT_GENERATION:
        raise PlatformError(
            f"the model {model.name!r} ({model.id}) has the target type {model.target_type}, not TextGeneration",
            "Give the new model another name with --name.",
        )
    return model


def _environment(wish: ModelWish) -> tuple[str, str]:
    """The environment, and the version of it that the model is pinned to: what is tested is what is served."""
    environment = find_environment(wish.environment, wish.environment_id)
    if environment is None:
        raise PlatformError(
            f"there is no environment called {wish.environment!r}", "Push it first: vllm-dropin push environment."
        )
    if wish.environment_version:
        with explained("looking for the environment's version"):
            version = ExecutionEnvironmentVersion.get(environment.id, wish.environment_version)
        if version.build_status != "success":
            raise PlatformError(
                f"version {version.id} of the environment is not built: {version.build_status}",
                "Run vllm-dropin push environment until it says success.",
            )
        return environment.id, version.id
    latest = environment.latest_successful_version
    if latest is None:
        raise PlatformError(
            f"the environment {environment.name!r} ({environment.id}) has no version that is built",
            "Run vllm-dropin push environment until it says success.",
        )
    return environment.id, latest.id


def _bundle(wanted: str | None) -> str | None:
    if wanted is None:
        return None
    with explained("listing resource bundles"):
        bundles = ResourceBundle.list(use_cases=["customModel"])
    found = [bundle for bundle in bundles if wanted in (bundle.id, bundle.name)]
    bundle = only("resource bundle", wanted, found, "--bundle")
    if bundle is None:
        known = ", ".join(f"{item.id} ({item.name}{', GPU' if item.has_gpu else ''})" for item in bundles)
        raise PlatformError(f"there is no resource bundle {wanted!r}", f"The platform has: {known or 'none'}.")
    return bundle.id


def _version(
    platform: Platform, wish: ModelWish, model: CustomInferenceModel, environment: str, pinned: str, bundle: str | None
) -> CustomModelVersion:
    """The version with this content and these settings.

    It takes up to two calls, files first and then the bundle, which makes a version of its own; each is marked with a
    digest of what it holds, so that a run that was cut off between them goes on with the second.
    """
    resources = wish.resources
    content = {
        "files": digest_of(wish.files), "environment": [environment, pinned], "memory": resources.memory,
        "replicas": resources.replicas, "egress": resources.egress, "parameters": dict(wish.parameters or {}),
    }  # fmt: skip
    plain, whole = digest_json(content), digest_json({**content, "bundle": bundle} if bundle else content)
    with explained("listing the model's versions"):
        versions = CustomModelVersion.list(model.id)
    known = next((version for version in versions if has_mark(whole, version.description)), None)
    if known is not None:
        platform.say(f"this content is there already: version {_number(known)}, {known.id}")
        return known
    version = next((version for version in versions if has_mark(plain, version.description)), None)
    if version is None:
        version = _create(platform, wish, model, environment, pinned)
        _mark(version, wish, plain)
    if bundle:
        version = _with_bundle(platform, version, environment, pinned, bundle)
        _mark(version, wish, whole)
    return version


def _create(
    platform: Platform, wish: ModelWish, model: CustomInferenceModel, environment: str, pinned: str
) -> CustomModelVersion:
    size = sum(path.stat().st_size for _, path in wish.files)
    platform.say(f"sending {len(wish.files)} files, {size / (1 << 20):,.1f} MiB")
    values = [
        RuntimeParameterValue(field_name=name, type=kind, value=value)
        for name, (kind, value) in (wish.parameters or {}).items()
    ]
    with explained("creating a version of the model"):
        version = CustomModelVersion.create_clean(
            model.id,
            base_environment_id=environment,
            base_environment_version_id=pinned,
            files=[(str(path), name) for name, path in wish.files],
            network_egress_policy=wish.resources.egress,  # type: ignore[arg-type]
            maximum_memory=wish.resources.memory,
            replicas=wish.resources.replicas,
            runtime_parameter_values=values or None,
            max_wait=_UPLOAD_SECONDS,
        )
    platform.say(f"version {_number(version)} created: {version.id}")
    return version


def _mark(version: CustomModelVersion, wish: ModelWish, digest: str) -> None:
    with explained("describing the version"):
        version.update(description=marked(digest, wish.description))


def _with_bundle(
    platform: Platform, version: CustomModelVersion, environment: str, pinned: str, bundle: str
) -> CustomModelVersion:
    """A version like this one on another bundle. The SDK has no method for it, so the call is written out here."""
    body = {
        "isMajorUpdate": "false", "baseEnvironmentId": environment, "baseEnvironmentVersionId": pinned,
        "resourceBundleId": bundle,
    }  # fmt: skip
    with explained("choosing the resource bundle"):
        answer = platform.client.patch(f"customModels/{version.custom_model_id}/versions/", data=body)
        changed = CustomModelVersion.from_server_data(answer.json())
    platform.say(f"version {_number(changed)} on the bundle {bundle}: {changed.id}")
    return changed


def _number(version: CustomModelVersion) -> str:
    return f"{version.version_major}.{version.version_minor}"


def _build_dependencies(platform: Platform, version: CustomModelVersion) -> None:
    """requirements.txt of the folder, installed into an image of its own."""
    ids = version.custom_model_id, version.id

    def read() -> CustomModelVersionDependencyBuild | None:
        with explained("asking for the build of requirements.txt"):
            try:
                return CustomModelVersionDependencyBuild.get_build_info(*ids)
            except Refused as refused:
                if refused.status != 404:
                    raise
                return None

    def look() -> tuple[str, CustomModelVersionDependencyBuild | None]:
        build = read()
        state = build.build_status if build else "not begun"
        return state, build if state in ("success", "failed") else None

    begun = read()
    if begun is None or begun.build_status == "failed":
        with explained("building requirements.txt"):
            CustomModelVersionDependencyBuild.start_build(*ids, max_wait=None)
    done = platform.wait("build of requirements.txt", look)
    if done.build_status == "failed":
        with explained("reading the build log"):
            log = printable(done.get_log(), keep="\n")
        end = "\n  ".join(log.splitlines()[-_TAIL:])
        raise PlatformError(f"requirements.txt can't be installed:\n  {end}", "Correct it and push the folder again.")


def _test(platform: Platform, wish: ModelWish, version: CustomModelVersion) -> None:
    """The platform's own test: it starts the model and, with a dataset, scores it."""
    with explained("listing tests"):
        tests = [
            test for test in CustomModelTest.list(version.custom_model_id) if test.custom_model_image_id == version.id
        ]
    if any(test.overall_status == "succeeded" and test.dataset_id == wish.test_dataset for test in tests):
        platform.say("the test of this version succeeded before")
        return
    running = next((test for test in tests if test.overall_status == "in_progress"), None)
    if running is None:
        with explained("starting the test", {422: "Correct the value that it names, or push with --no-test."}):
            running = CustomModelTest.create(
                version.custom_model_id, version.id, dataset_id=wish.test_dataset, max_wait=None
            )
        platform.say(f"test {running.id} begun")
    test = running

    def look() -> tuple[str, str | None]:
        with explained("asking how the test goes"):
            test.refresh()
        return test.overall_status, None if test.overall_status == "in_progress" else test.overall_status

    if platform.wait("test", look) in ("succeeded", "warning"):
        return
    with explained("reading the test's log"):
        log = printable(test.get_log_tail(), keep="\n")
    details = cast(dict[str, dict[str, str]], test.detailed_status)
    checks = [
        f"{name}: {check['status']} {printable(check['message'])}".rstrip()
        for name, check in details.items()
        if check["status"] in ("failed", "error", "aborted")
    ]
    end = "\n  ".join([*checks, *log.splitlines()[-_TAIL:]])
    raise PlatformError(
        f"the test of version {version.id} ended as {test.overall_status}:\n  {end}",
        "Try the folder with `vllm-dropin check` and `serve`, correct it and push it again.",
    )
