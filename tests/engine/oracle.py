"""What vLLM's own parser makes of argument lists. Run under the engine's Python; JSON lists in, JSON answers out.

Each answer is null where vLLM refuses the list, else the flags that the list sets, with their raw values.
"""

import argparse
import contextlib
import copy
import json
import os
import sys
import warnings

(children,) = sys.argv[1:]
sys.path.insert(0, children)
import dump_flags  # noqa: E402

answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
warnings.simplefilter("ignore")
strict = dump_flags.build_parser()
raw = copy.deepcopy(strict)
for action in raw._actions:
    action.default = argparse.SUPPRESS
    action.choices = None
    if action.nargs != 0:
        action.type = str


def refuse(message: str) -> None:
    """argparse would first spend 50 ms on a usage text that nobody reads."""
    raise SystemExit(message)


strict.error = raw.error = refuse


def parse(args: list[str]) -> dict[str, object] | None:
    with contextlib.suppress(SystemExit, ValueError, IndexError):
        strict.parse_args(list(args))
        return vars(raw.parse_args(list(args)))
    return None


with answer:
    json.dump([parse(args) for args in json.load(sys.stdin)], answer, default=str)
