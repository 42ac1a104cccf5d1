"""`vllm-dropin serve FOLDER`: the model folder becomes a service."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of serve are those of the settings."""
    from vllm_dropin.cli.options import add_settings_arguments

    add_settings_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code; raises DropinError when serving had to end."""
    import asyncio
    import os

    from vllm_dropin import logging
    from vllm_dropin.cli.options import read_flags
    from vllm_dropin.settings.resolve import load
    from vllm_dropin.supervisor.supervisor import Supervisor

    settings = load(read_flags(arguments), os.environ)
    logging.setup(settings.log_level)
    logging.REDACTOR.learn(settings.secrets())
    log = logging.get("settings")
    for warning in settings.warnings:
        log.warning("%s", warning)
    return asyncio.run(Supervisor(settings).run())
