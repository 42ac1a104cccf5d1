"""`vllm-dropin push environment|model|deploy`: publish on DataRobot, again and again with the same result."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dropin.errors import ConfigurationError

if TYPE_CHECKING:
    from vllm_dropin.model.folder import ModelFolder
    from vllm_dropin.platforms.datarobot.platform import Platform

_EPILOG = "The platform is DATAROBOT_ENDPOINT, the key DATAROBOT_API_TOKEN. Run it again after a failure: it goes on."
_SIZE = re.compile(r"(\d+)\s*(?:(k|m|g|t)(?:i?b)?)?", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    _environment_arguments(what)
    _model_arguments(what)
    _deploy_arguments(what)


def _command(
    what: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    command = what.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    command.epilog = _EPILOG
    command.add_argument("--dry-run", action="store_true", help="show every call and send none")
    command.add_argument(
        "--wait", type=float, default=3600, metavar="SECONDS",
        help="how long to wait for each thing that the platform builds (default: 3600)",
    )  # fmt: skip
    command.add_argument(
        "--poll", type=float, default=5, metavar="SECONDS", help="pause between two looks at it (default: 5)"
    )
    return command


def _environment_arguments(what: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = _command(what, "environment", "create or version a custom environment and follow its build").add_argument
    add("context", metavar="CONTEXT", help="what `vllm-dropin build` wrote: an archive or a folder")
    add("--name", metavar="NAME", help="of the environment (default: the one in env_info.json)")
    add("--id", metavar="ID", help="of an environment that is there, instead of a name")
    add("--label", metavar="TEXT", help="of the version (default: the one in env_info.json)")


def _model_arguments(what: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = _command(what, "model", "create or version a custom model from a folder and test it").add_argument
    add("folder", metavar="FOLDER", help="the model folder")
    add("--name", metavar="NAME", help="of the model (default: the name in model-metadata.yaml)")
    add("--id", metavar="ID", help="of a model that is there, instead of a name")
    add("--environment", metavar="NAME", default="", help="the custom environment to run in")
    add("--environment-id", metavar="ID", help="the same by its id")
    add("--environment-version", metavar="ID", help="a version of it (default: the latest that is built)")
    add("--exclude", action="append", default=[], metavar="GLOB", help="files to leave out; may be repeated")
    add("--param", action="append", default=[], metavar="NAME=VALUE", help="a runtime parameter; may be repeated")
    add(
        "--credential", action="append", default=[], metavar="NAME=ID",
        help="a runtime parameter that is a credential, by the id of one that the platform keeps; may be repeated",
    )  # fmt: skip
    add("--bundle", metavar="NAME", help="the resource bundle (GPU), by name or id")
    add("--memory", metavar="SIZE", help="most memory of a replica, such as 32GiB")
    add("--replicas", type=int, metavar="N", help="how many run at once")
    add("--egress", choices=("none", "public"), help="whether the model may reach the network")
    add("--test-dataset", metavar="ID", help="a dataset of the platform to test with (default: only a start)")
    add("--no-test", action="store_true", help="do not test the version")


def _deploy_arguments(what: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = _command(what, "deploy", "register a version of a custom model and deploy it").add_argument
    add("folder", nargs="?", metavar="FOLDER", help="the model folder, for the names in its metadata")
    add("--model", metavar="NAME", help="the custom model (default: the name in model-metadata.yaml)")
    add("--model-id", metavar="ID", help="the same by its id")
    add("--version", metavar="ID", help="of the custom model (default: the latest)")
    add("--registered-name", metavar="NAME", help="in the registry (default: the model's name)")
    add("--registered-id", metavar="ID", help="the same by its id")
    add("--label", metavar="TEXT", help="of the deployment (default: the model's name)")
    add("--id", metavar="ID", help="of a deployment that is there, instead of a label")
    where = _command_group(add)
    where("--prediction-environment", metavar="ID", help="where it is to run")
    where("--prediction-server", metavar="ID", help="the same on platforms with prediction servers")
    add("--importance", choices=("CRITICAL", "HIGH", "MODERATE", "LOW"), help="of the deployment")
    add("--replace", action="store_true", help="change what a deployment of that label serves")


def _command_group(add: Callable[..., argparse.Action]) -> Callable[..., argparse.Action]:
    parser: argparse.ArgumentParser = add.__self__  # type: ignore[attr-defined]
    return parser.add_mutually_exclusive_group().add_argument


def run(args: argparse.Namespace) -> int:
    """Progress on stderr, what was made on stdout. Returns 0, or raises: 78 for what is refused, 74 for the network."""
    if args.engine_args:
        raise ConfigurationError("push takes no flags of vLLM", "Put them into the model folder's engine_config.json.")
    if args.poll < 0 or args.wait < 0:
        raise ConfigurationError("--poll and --wait are seconds", "Give 0 or more.")
    work = {"environment": _environment, "model": _model, "deploy": _deploy}[args.what](args)
    platform = _connect(args)
    try:
        lines = work(platform)
    except KeyboardInterrupt:
        _say("interrupted; the platform goes on with what it was sent, and the same command goes on from there")
        raise
    finally:
        platform.client.close()
    if args.dry_run:
        _say("nothing was sent; an id in <> is one that the platform would have given")
    else:
        print("\n".join(lines))
    return 0


def _say(line: str) -> None:
    from vllm_dropin.logging import REDACTOR

    print(REDACTOR.hide(line), file=sys.stderr, flush=True)


def _connect(args: argparse.Namespace) -> Platform:
    from vllm_dropin.logging import REDACTOR
    from vllm_dropin.platforms.datarobot.account import read_account

    account = read_account(os.environ)
    REDACTOR.learn([account.token.reveal()])
    try:
        from vllm_dropin.platforms.datarobot.platform import connect
        from vllm_dropin.platforms.datarobot.rehearsal import Rehearsal
    except ImportError as error:
        raise ConfigurationError(
            f"push needs the platform's SDK ({error.name} is missing)", "pip install 'vllm-dropin[datarobot]'"
        ) from None
    rehearsal = None
    if args.dry_run:
        there = {"environment": (), "model": ("executionEnvironments", "bundles"), "deploy": ("customModels",)}
        rehearsal = Rehearsal(lambda line: print(REDACTOR.hide(line)), frozenset(there[args.what]), _asked(args))
    return connect(account, _say, args.poll, args.wait, rehearsal)


def _asked(args: argparse.Namespace) -> str:
    """What a rehearsal calls the bundle that it finds: its list is not searched by name."""
    return getattr(args, "bundle", None) or "<name>"


Work = Callable[["Platform"], Sequence[str]]


def _environment(args: argparse.Namespace) -> Work:
    from vllm_dropin.platforms.datarobot.contents import read_context

    context = read_context(Path(args.context))
    name = args.name or context.text("name")
    if not name and not args.id:
        raise ConfigurationError(f"{context.path} has no env_info.json that names it", "Give the environment a --name.")

    def work(platform: Platform) -> Sequence[str]:
        from vllm_dropin.platforms.datarobot import environments

        environment, version = environments.push(
            platform, environments.EnvironmentWish(context, name, args.id, args.label)
        )
        return [f"environment {environment.id}", f"version {version.id}"]

    return work


def _model(args: argparse.Namespace) -> Work:
    from vllm_dropin.model.folder import read_folder
    from vllm_dropin.platforms.datarobot.contents import model_files

    folder = read_folder(Path(args.folder))
    name = _name(args.name, args.id, folder, "--name")
    if not args.environment and not args.environment_id:
        raise ConfigurationError("which environment should the model run in?", "Give --environment NAME.")
    files = model_files(folder.path, args.exclude)
    parameters = _parameters(folder, args.param, args.credential)
    memory = None if args.memory is None else _bytes(args.memory)
    if args.replicas is not None and args.replicas < 1:
        raise ConfigurationError(f"--replicas {args.replicas}: at least one has to run")
    facts = _facts(folder)

    def work(platform: Platform) -> Sequence[str]:
        from vllm_dropin.platforms.datarobot import models

        egress = args.egress and args.egress.upper()
        wish = models.ModelWish(
            name, files, args.environment, args.id, args.environment_id, args.environment_version,
            facts.description, facts.target_name, parameters,
            models.Resources(args.bundle, memory, args.replicas, egress), not args.no_test, args.test_dataset,
        )  # fmt: skip
        model, version = models.push(platform, wish)
        return [f"model {model.id}", f"version {version.id}"]

    return work


def _deploy(args: argparse.Namespace) -> Work:
    from vllm_dropin.model.folder import read_folder

    folder = read_folder(Path(args.folder)) if args.folder else None
    model = _name(args.model, args.model_id, folder, "--model")
    label, registered = args.label or model, args.registered_name or model
    if (not label and not args.id) or (not registered and not args.registered_id):
        raise ConfigurationError("the deployment needs a name", "Give --label and --registered-name, or a FOLDER.")

    def work(platform: Platform) -> Sequence[str]:
        from vllm_dropin.platforms.datarobot import deployments

        wish = deployments.DeploymentWish(
            model, label, registered, args.model_id, args.version, args.id, args.registered_id,
            args.prediction_environment, args.prediction_server, args.importance, args.replace,
        )  # fmt: skip
        version, deployment = deployments.push(platform, wish)
        return [
            f"registered version {version.id}",
            f"deployment {deployment.id} ({deployment.status})",
            f"OpenAI base URL {platform.client.endpoint}/deployments/{deployment.id}",
        ]

    return work


def _name(given: str | None, identifier: str | None, folder: ModelFolder | None, option: str) -> str:
    """The name in the metadata where none is given."""
    name = given or (folder.metadata.name if folder and folder.metadata else "")
    if not name and not identifier:
        raise ConfigurationError("the model has no name", f"Give {option}, or a folder with a model-metadata.yaml.")
    return str(name)


@dataclass(frozen=True)
class _Facts:
    description: str = ""
    target_name: str = "resultText"


def _facts(folder: ModelFolder) -> _Facts:
    """What the metadata says about the model beside its name."""
    metadata = folder.metadata
    if metadata is None:
        return _Facts()
    inference = metadata.inferenceModel if isinstance(metadata.inferenceModel, dict) else {}
    target = inference.get("targetName")
    return _Facts(str(metadata.description or ""), str(target) if target else _Facts.target_name)


def _parameters(
    folder: ModelFolder, params: Sequence[str], credentials: Sequence[str]
) -> dict[str, tuple[str, str | float | bool | None]]:
    """Runtime parameters as the platform takes them: (type, value) by name.

    Raises ConfigurationError for one that the folder does not define (the platform would refuse it) and for a
    credential given by value.
    """
    from vllm_dropin.model.nearest import did_you_mean
    from vllm_dropin.model.parameters import read_parameters

    defined = {
        item.fieldName: item.type for item in (folder.metadata.runtimeParameterDefinitions if folder.metadata else ())
    }

    def split(option: str, text: str) -> tuple[str, str]:
        name, equals, value = text.partition("=")
        if not equals or not value:
            raise ConfigurationError(f"{option} {name}: a value is missing", f"Write {option} NAME=VALUE.")
        if name not in defined:
            raise ConfigurationError(
                f"{option} {name}: model-metadata.yaml defines no such parameter{did_you_mean(name, defined)}",
                "Add it to runtimeParameterDefinitions.",
            )
        if (defined[name] == "credential") != (option == "--credential"):
            right = "--credential NAME=ID" if option == "--param" else "--param NAME=VALUE"
            raise ConfigurationError(
                f"{option} {name}: it is defined as {defined[name]}",
                f"Write {right}." + (" Only the id leaves this machine." if option == "--param" else ""),
            )
        return name, value

    names = [split("--param", text)[0] for text in params]
    values = read_parameters(folder.metadata, {}, params=params)
    found: dict[str, tuple[str, str | float | bool | None]] = {}
    for name in names:
        payload = values.get(name).payload
        if payload is not None and not isinstance(payload, str | bool | int | float):
            raise AssertionError
        found[name] = (defined[name], payload)
    for text in credentials:
        name, identifier = split("--credential", text)
        if not re.fullmatch(r"[0-9A-Fa-f]{24}", identifier):  # not repeated: it may be the secret itself
            raise ConfigurationError(
                f"--credential {name}: this is no id of a stored credential",
                "Store it on the platform (credentials management) and give its id, 24 hexadecimal digits.",
            )
        found[name] = ("credential", identifier)
    return found


def _bytes(text: str) -> int:
    """`32GiB` in bytes. Units are powers of 1024."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or int(found[1]) == 0:
        raise ConfigurationError(f"--memory {text}: this is no size", "Write it as 32GiB or 2048MiB.")
    return int(found[1]) << 10 * (" kmgt".index((found[2] or " ").lower()))
