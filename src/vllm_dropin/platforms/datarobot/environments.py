"""`push environment`: a custom environment by its name, and a version of it that is built from a context."""

from __future__ import annotations

from dataclasses import dataclass

from datarobot.models.execution_environment import ExecutionEnvironment
from datarobot.models.execution_environment_version import ExecutionEnvironmentVersion

from vllm_dropin.errors import PlatformError
from vllm_dropin.platforms.datarobot.client import Refused, explained
from vllm_dropin.platforms.datarobot.contents import Context
from vllm_dropin.platforms.datarobot.platform import Platform, has_mark, marked, only

_TAIL = 30  # lines of a build log that an error repeats
_LABEL = 50
_DESCRIPTION = 9000


@dataclass(frozen=True)
class EnvironmentWish:
    """What there should be. `id` wins over `name`."""

    context: Context
    name: str
    id: str | None = None
    label: str | None = None


def push(platform: Platform, wish: EnvironmentWish) -> tuple[ExecutionEnvironment, ExecutionEnvironmentVersion]:
    """Create or find the environment and the version, and wait until it is built.

    Raises PlatformError when the build fails, with the end of its log.
    """
    environment = find(wish.name, wish.id)
    if environment is None:
        with explained(f"creating the environment {wish.name!r}"):
            environment = ExecutionEnvironment.create(
                wish.name, wish.context.text("description") or None, "python", use_cases=["customModel"]
            )
        platform.say(f"environment {wish.name!r} created: {environment.id}")
    else:
        platform.say(f"environment {environment.name!r} is there: {environment.id}")
    version = _known_version(environment, wish.context.digest)
    if version is None:
        version = _upload(platform, environment, wish)
    elif version.build_status == "success":
        platform.say(f"this context is built already: version {version.id}")
        return environment, version
    else:
        platform.say(f"this context was sent before: version {version.id}")
    return environment, _follow(platform, environment, version.id)


def find(name: str, identifier: str | None) -> ExecutionEnvironment | None:
    """By id, else by exact name. Raises PlatformError for an id that is not there and a name that is there twice."""
    if identifier:
        with explained(f"looking for the environment {identifier}"):
            return ExecutionEnvironment.get(identifier)
    with explained("listing environments"):
        found = [item for item in ExecutionEnvironment.list(search_for=name) if item.name == name]
    return only("environment", name, found, "--id")


def _known_version(environment: ExecutionEnvironment, digest: str) -> ExecutionEnvironmentVersion | None:
    """The version of this very context that is built, or on its way; one that failed is tried anew."""
    with explained("listing the environment's versions"):
        versions = ExecutionEnvironmentVersion.list(environment.id)
    same = [version for version in versions if has_mark(digest, version.description)]
    built = [version for version in same if version.build_status == "success"]
    return next(iter(built or [version for version in same if version.build_status != "failed"]), None)


def _upload(
    platform: Platform, environment: ExecutionEnvironment, wish: EnvironmentWish
) -> ExecutionEnvironmentVersion:
    context = wish.context
    label = wish.label or context.text("label")
    description = context.text("environmentVersionDescription")[:_DESCRIPTION]
    platform.say(f"sending {context.path.name}, {context.size / (1 << 20):,.1f} MiB")
    with explained("creating a version of the environment"):
        version = ExecutionEnvironmentVersion.create(
            environment.id,
            docker_context_path=str(context.path),
            label=label[:_LABEL] or None,
            description=marked(context.digest, description),
            max_wait=None,
        )
    platform.say(f"version {version.id} is sent")
    return version


def _follow(platform: Platform, environment: ExecutionEnvironment, identifier: str) -> ExecutionEnvironmentVersion:
    """Until it is built, with its log as it grows."""
    shown = 0

    def look() -> tuple[str, ExecutionEnvironmentVersion | None]:
        nonlocal shown
        with explained("asking how the build goes"):
            version = ExecutionEnvironmentVersion.get(environment.id, identifier)
        lines, _ = build_log(version)
        for line in lines[shown:]:
            platform.say(f"  | {line}")
        shown = max(shown, len(lines))
        return version.build_status, version if version.build_status in ("success", "failed") else None

    version = platform.wait("build", look)
    if version.build_status == "failed":
        lines, error = build_log(version)
        end = "\n  ".join([*lines[-_TAIL:], *(error or "").splitlines()])
        raise PlatformError(
            f"the build of version {version.id} failed" + (f":\n  {end}" if end else ""),
            "Correct the context and push it again: the same context would be built anew.",
        )
    return version


def build_log(version: ExecutionEnvironmentVersion) -> tuple[list[str], str | None]:
    """The log so far, and the error that ended it. There is none before the build has begun."""
    try:
        with explained("reading the build log"):
            try:
                log, error = version.get_build_log()
            except Refused as refused:
                if refused.status != 404:
                    raise
                return [], None
    except PlatformError:
        return [], None  # a right to build without a right to the log is no reason to stop
    return [printable(line) for line in (log or "").splitlines()], error and printable(error, keep="\n")


def printable(text: str, keep: str = "") -> str:
    """Without what could steer a terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter in keep)
