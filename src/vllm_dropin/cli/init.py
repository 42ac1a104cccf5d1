"""`vllm-dropin init DIR`: the beginning of a model folder, with everything in it that can be set."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

_HOOKS = ("none", "hub", "s3", "azure", "gcs", "local")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="the folder to make; one that is there is added to, never changed")
    parser.add_argument(
        "--model", metavar="ID", help="the model: a hub id, or where --hook fetches it (s3://…, az://…, gs://…, a path)"
    )
    parser.add_argument(
        "--hook", choices=_HOOKS, default="none", help="which custom.py brings the weights (default: none)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the files and say what is next. Raises ConfigurationError (78) rather than overwrite one."""
    from vllm_dropin.scaffold import folder

    path = Path(args.dir)
    files = folder.plan(path, args.model, args.hook)
    folder.write(path, files)
    print(f"{path} has now:")
    for name in files:
        print(f"  {name}")
    where = shlex.quote(str(path))
    variant = folder.VARIANTS[args.hook]
    if args.model is None and variant.located:
        print("Next: set model_location in model-metadata.yaml (defaultValue), or for each deployment.")
    elif args.model is None:
        print(f"Next: set model in model-metadata.yaml (defaultValue), or put weights into {path / 'vllm'}.")
    print(f"Then: vllm-dropin check {where}")
    return 0
