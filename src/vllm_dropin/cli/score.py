"""`vllm-dropin score`: every row of a file is answered, whatever happens on the way."""

from __future__ import annotations

import argparse
import re
import sys

from vllm_dropin.batch.request import MaxErrors, Replicas, ScoreRequest
from vllm_dropin.cli.options import VARIABLES, add_options, read_flags
from vllm_dropin.errors import ConfigurationError

_OPTIONS = (
    "runtime_params_file", "engine_python", "upstream_key_file", "state_dir", "runtime_dir", "hook_timeout",
    "start_timeout", "hang_timeout", "logging_level", "verbose",
)  # fmt: skip
"""Of the settings' options, those that say something about an engine without a public port."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "vllm-dropin score [options] FOLDER INPUT... -o OUTPUT [-- vLLM flags]\n"
        "       vllm-dropin score [options] --url URL INPUT... -o OUTPUT"
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="FOLDER INPUT",
        help="the model folder, then what to score: "
        "files, globs, folders, URLs such as s3://bucket/rows.parquet, or - for standard input",
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUTPUT", help="the file to write; - for standard output"
    )
    parser.add_argument(
        "--url",
        metavar="URL",
        help="an OpenAI server to ask instead of a model folder, such as "
        "http://localhost:8000/v1; its key is taken from OPENAI_API_KEY",
    )
    parser.add_argument("--model", metavar="NAME", help="with --url: the model to ask (default: the first it lists)")
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--format",
        metavar="FORMAT",
        help="of the input: csv, tsv, jsonl, parquet, openai-batch (default: by extension)",
    )
    rows.add_argument("--output-format", metavar="FORMAT", help="of the output (default: by extension)")
    rows.add_argument("--charset", metavar="NAME", help="of CSV and TSV (default: by the byte order mark, else UTF-8)")
    rows.add_argument(
        "--prompt-column",
        metavar="NAME",
        help="column with the prompt (default: the parameter prompt_column_name, else promptText)",
    )
    rows.add_argument("--messages-column", metavar="NAME", help="column with whole chats (default: messages)")
    rows.add_argument("--template", metavar="FILE", help="Jinja2 template that makes the prompt of a row's columns")
    rows.add_argument(
        "--params",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a generation parameter of every row, such as "
        "temperature=0.2, or a JSON object of several; may be repeated",
    )
    rows.add_argument(
        "--row-params",
        metavar="A,B",
        help="columns that are generation parameters of their row, such as max_tokens,seed",
    )
    rows.add_argument("--response-format", metavar="FILE", help="JSON Schema that every completion has to follow")
    rows.add_argument("--columns", metavar="A,B", help="input columns to keep in the output (default: all)")
    rows.add_argument(
        "--explode", action="store_true", help="with n > 1: one output row for each completion instead of a list"
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--order",
        choices=("input", "prefix", "auto"),
        default="auto",
        help="in which order rows are sent: prefix "
        "puts rows with the same beginning together, auto does so where it saves work (default: auto)",
    )
    run.add_argument(
        "--unordered", action="store_true", help="write rows in the order of their answers (default: of the input)"
    )
    run.add_argument(
        "--concurrency", type=_count, metavar="N", help="rows at the engine at once (default: as many as fill it)"
    )
    run.add_argument(
        "--max-errors",
        type=_max_errors,
        metavar="N|P%",
        help="stop when more rows than this have failed (default: never)",
    )
    run.add_argument("--restart", action="store_true", help="drop what an earlier run has answered, and the output")
    run.add_argument(
        "--journal",
        metavar="FOLDER",
        help="where answers are kept until all are there (default: OUTPUT.partial; "
        "for a remote output, a folder in the state folder)",
    )
    run.add_argument("--json", action="store_true", help="print a summary as JSON at the end")
    ray = parser.add_argument_group("more than one machine")
    ray.add_argument(
        "--ray",
        nargs="?",
        const="",
        type=_address,
        metavar="ADDRESS",
        help="run the engines on a Ray cluster: the one at ADDRESS (host:port), else that of RAY_ADDRESS or of this "
        "machine, else a new one (local)",
    )
    ray.add_argument(
        "--replicas",
        type=_replicas,
        metavar="MIN:MAX",
        help="with --ray: how many engines, or how few and how many (default: 1)",
    )
    engine = parser.add_argument_group("engine", VARIABLES)
    engine.add_argument(
        "--param", action="append", default=[], metavar="NAME=VALUE", help="a runtime parameter; may be repeated"
    )
    add_options(engine, _OPTIONS)
    parser.epilog = "Interrupted, killed or out of disk: the same command goes on where it was."


def run(args: argparse.Namespace) -> int:
    """Score. Returns 0 when every row has its answer (a failed row's is its error), 130 or 143 after a signal.

    Raises DropinError when it had to end before.
    """
    import os

    from vllm_dropin.batch.run import score

    if args.replicas is not None and args.ray is None:
        raise ConfigurationError("--replicas says how many engines a Ray cluster runs", "Add --ray, or leave it out.")
    words = list(args.words)
    args.folder = None if args.url else words.pop(0)
    if not words:
        raise ConfigurationError(
            "no input is given",
            "Name the model folder, then what to score: vllm-dropin score FOLDER rows.csv -o out.csv.",
        )
    request = ScoreRequest(
        inputs=tuple(words),
        output=args.output,
        format=args.format,
        output_format=args.output_format,
        charset=args.charset,
        prompt_column=args.prompt_column,
        messages_column=args.messages_column,
        template=args.template,
        params=tuple(args.params),
        row_params=_names(args.row_params),
        response_format=args.response_format,
        columns=_names(args.columns) if args.columns is not None else None,
        explode=args.explode,
        order=args.order,
        ordered=not args.unordered,
        concurrency=args.concurrency,
        max_errors=args.max_errors or MaxErrors(),
        restart=args.restart,
        journal=args.journal,
        summary=args.json,
        url=args.url,
        model=args.model,
        ray=args.ray,
        replicas=args.replicas or Replicas(),
    )
    return score(request, read_flags(args), os.environ, sys.stderr)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _address(text: str) -> str:
    if text not in ("", "auto", "local") and ":" not in text:
        # Most likely --ray stands before the model folder, which it must not swallow.
        raise argparse.ArgumentTypeError(f"{text!r} is no address such as 10.0.0.1:6379; without one, write --ray=")
    return text


def _replicas(text: str) -> Replicas:
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
    minimum, maximum = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= minimum <= maximum:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of engines nor a range such as 1:8")
    return Replicas(minimum, maximum)


def _max_errors(text: str) -> MaxErrors:
    found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", text.strip())
    if found is None or float(found[2] or 0) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of rows nor a share such as 5%")
    return MaxErrors(count=int(found[1])) if found[1] else MaxErrors(share=float(found[2]) / 100)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())
