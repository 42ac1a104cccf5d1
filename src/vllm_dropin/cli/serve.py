"""`vllm-dropin serve FOLDER`: the model folder becomes a service."""

from __future__ import annotations

import argparse
import signal
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of serve are those of the settings."""
    from vllm_dropin.cli.options import add_settings_arguments

    add_settings_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code; raises DropinError when serving had to end."""
    for number in STOP_SIGNALS:  # first of all: the supervisor's own handlers are 0.2 s away
        signal.signal(number, leave)

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


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """The handler of a stop signal while nothing has been started yet: an asked stop, with exit code 0."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(0)
