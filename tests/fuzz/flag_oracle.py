"""What vLLM's own parser makes of argument lists. Run under the engine's Python, with the folder of dump_flags.py.

A JSON list a line in, a JSON object a line out: `{"namespace": {…}}`, or `{"error": …}` where vLLM refuses the list.
"""

import json
import os
import re
import sys
import warnings

(children,) = sys.argv[1:]
sys.path.insert(0, children)
import dump_flags  # noqa: E402

answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
warnings.simplefilter("ignore")
parser = dump_flags.build_parser()


def refuse(message: str) -> None:
    """argparse would first spend 50 ms on a usage text that nobody reads."""
    raise SystemExit(message)


parser.error = refuse
parser.print_help = lambda: refuse("help")


def shown(value: object) -> str:
    """A config object as text, without the id that it draws anew each time."""
    return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", repr(value))


def parse(args: list[str]) -> dict[str, object]:
    # Whatever it raises would end `vllm serve`.
    try:
        return {"namespace": vars(parser.parse_args(args))}
    except SystemExit as end:
        return {"error": str(end)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


with answer:
    for line in sys.stdin:
        print(json.dumps(parse(json.loads(line)), default=shown), file=answer, flush=True)
