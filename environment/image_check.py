"""Run while the image is built: is the base what the Dockerfile takes it for, and do the pieces work together?

    image_check.py base PYTHON [DISTRIBUTION VERSION]     the base has this Python, and this version of vLLM
    image_check.py hooks FOLDER                           what hooks import is found behind the engine's own packages

Standard library only; run by the image's own Python.
"""

import importlib
import sys
from importlib import metadata

CLIENTS = ("azure.storage.blob", "boto3", "google.cloud.storage", "huggingface_hub", "pandas", "requests")


def base(python: str, distribution: str = "", version: str = "") -> str:
    """What is wrong with the base image, or nothing."""
    found = "{}.{}".format(*sys.version_info)
    if found != python:
        return (
            f"the base image has Python {found}, and this context was made for {python}: build it with --python {found}"
        )
    if not distribution:
        return ""
    try:
        installed = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return f"the base image has no {distribution} for {sys.executable}: name another one with --base"
    if installed.partition("+")[0] != version:
        return f"the base image has {distribution} {installed}, and this context was made for {version}: use --vllm"
    return ""


def hooks(folder: str) -> str:
    """What a hook could not import, or nothing."""
    sys.path.append(folder)
    for name in CLIENTS:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 (whatever it is, a hook would meet it too)
            return f"a hook can't import {name}: {error!r}"
    return ""


if __name__ == "__main__":
    check, *arguments = sys.argv[1:]
    complaint = base(*arguments) if check == "base" else hooks(*arguments)
    if complaint:
        sys.exit(f"error: {complaint}")
    print("checked:", *sys.argv[1:])
