"""One `score` command from its options to the finished output."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging as standard_logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TextIO, TypeVar
from urllib.parse import urlsplit

import uvloop

from vllm_dropin import logging
from vllm_dropin.batch.asking import AskOptions
from vllm_dropin.batch.inputs import find_inputs
from vllm_dropin.batch.job import Job, JobOptions
from vllm_dropin.batch.journal import Journal, sync_folder
from vllm_dropin.batch.outputs import plan_output
from vllm_dropin.batch.parameters import parse_params
from vllm_dropin.batch.progress import Progress, closing_words
from vllm_dropin.batch.records import CsvOptions, Source
from vllm_dropin.batch.request import ScoreRequest
from vllm_dropin.batch.requests import Composer, RequestOptions, read_response_format
from vllm_dropin.batch.server import Server, serving
from vllm_dropin.batch.storage import STDIO, Location, locate, writing
from vllm_dropin.batch.stream import Stream
from vllm_dropin.batch.templates import read_template
from vllm_dropin.batch.work import engine_fingerprint, inputs_fingerprint
from vllm_dropin.batch.writing import open_writer
from vllm_dropin.engine.quirks import for_files
from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.folder import ModelFolder
from vllm_dropin.model.secret import Secret
from vllm_dropin.settings.access import is_loopback
from vllm_dropin.settings.options import Flags
from vllm_dropin.settings.resolve import load, resolve
from vllm_dropin.settings.settings import Settings
from vllm_dropin.supervisor.briefing import generation_defaults

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_KEY = "OPENAI_API_KEY"

T = TypeVar("T")


def score(request: ScoreRequest, flags: Flags, environ: Mapping[str, str], messages: TextIO) -> int:
    """Score, with progress and what else is to be said on `messages`. Returns the exit code; raises DropinError."""
    settings = read_settings(request, flags, environ)
    logging.setup(_level(settings))
    logging.REDACTOR.learn(settings.secrets())
    log = logging.get("settings")
    for warning in settings.warnings:
        log.warning("%s", warning)
    return uvloop.run(_until_signal(_Run(request, settings, messages, flags, environ)))


async def _until_signal(run: _Run) -> int:
    work = asyncio.ensure_future(run.run())
    came: list[int] = []

    def stop(number: int) -> None:
        came.append(number)
        work.cancel()

    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        await work
    except asyncio.CancelledError:
        if not came:
            raise
        return 128 + came[0]
    return 0


class _Run:
    """What one command holds between its steps."""

    def __init__(
        self,
        request: ScoreRequest,
        settings: Settings,
        messages: TextIO,
        flags: Flags,
        environ: Mapping[str, str],
    ) -> None:
        self._request = request
        self._settings = settings
        self._messages = messages
        self._flags = flags
        self._environ = environ
        if request.ray is not None:
            from vllm_dropin.batch.ray_cluster import require_ray

            require_ray()
        self._output = None if request.output == STDIO else locate(request.output)
        inputs = find_inputs(request.inputs, request.format, self._output)
        self._source = Source(inputs, CsvOptions(request.charset))
        self._options = _request_options(request)
        composer = self._composer(None, None)
        composer.check(self._source.columns)
        self._plan = plan_output(
            request.output,
            self._source,
            format=request.output_format,
            columns=request.columns,
            many=composer.many,
            explode=request.explode,
        )

    def _composer(self, model: str | None, max_model_len: int | None) -> Composer:
        defaults = generation_defaults(self._settings.generation).capped(max_model_len)
        return Composer(self._options, defaults, model, self._source.format)

    async def run(self) -> None:
        if self._output is None or not self._source.rereadable:
            if self._request.ray is not None:
                raise ConfigurationError(
                    "--ray needs files", "Save the input to a file, and name a file for the output."
                )
            await self._stream()
        else:
            await self._with_journal(self._output)

    async def _stream(self) -> None:
        """Answers go straight to the output: what can't be read twice can't be gone on with."""
        request = self._request
        new = None if self._output is None else _beside(self._output, ".new")
        if self._output is not None and self._output.exists() and not request.restart:
            raise _exists(request.output)
        writer = await asyncio.to_thread(open_writer, new or sys.stdout.buffer, self._plan, self._source)
        try:
            sink = Stream(writer, ordered=request.ordered)
            progress = Progress(self._messages, sink.tally)
            async with self._serving(progress, None) as server:
                await self._job(sink, server, progress).run()
                restarts = server.restarts
            await asyncio.to_thread(writer.close)
        except BaseException:
            writer.abort()
            raise
        if new is not None and self._output is not None:
            _put_in_place(new, self._output)
        self._finish(progress, restarts)

    async def _with_journal(self, output: Location) -> None:
        request = self._request
        folder = self._journal_folder(output)
        if not request.restart and not (folder / "manifest.json").exists() and output.exists():
            raise _exists(request.output)
        fingerprint = await asyncio.to_thread(self._fingerprint)
        with closing(Journal.open(folder, fingerprint, restart=request.restart)) as journal:
            progress = Progress(self._messages, journal.tally)
            if journal.tally.rows:
                progress.say(f"going on: {journal.tally.rows:,} rows have been answered")
            rows = await _in_thread(lambda stopped: self._rows_if_all_answered(journal, stopped))
            restarts = 0
            try:
                if rows is None and request.ray is not None:
                    rows, restarts = await self._on_ray(journal, progress)
                elif rows is None:
                    async with self._serving(progress, folder) as server:
                        job = self._job(journal, server, progress)
                        await job.run()
                        rows, restarts = job.rows, server.restarts
                progress.say(f"writing {request.output}")
                await _in_thread(lambda stopped: self._assemble(journal, rows or 0, output, stopped))
            except BaseException:
                progress.say(f"{journal.tally.rows:,} answered rows are kept in {folder}: the same command goes on")
                raise
            journal.remove()
        self._finish(progress, restarts)

    async def _on_ray(self, journal: Journal, progress: Progress) -> tuple[int, int]:
        from vllm_dropin.batch.ray_run import RayWork, score_on_ray

        keep_reply = self._plan.format == "openai-batch"
        work = RayWork(self._request, self._flags, self._environ, self._settings, self._options, keep_reply)
        return await score_on_ray(work, self._source, journal, progress)

    def _fingerprint(self) -> dict[str, object]:
        return {
            **inputs_fingerprint(self._source.files),
            **engine_fingerprint(self._settings, self._request.model),
            **self._composer(None, None).fingerprint(),
        }

    def _rows_if_all_answered(self, journal: Journal, stopped: threading.Event) -> int | None:
        """How many rows the input has, when no engine is needed any more; None at the first that has no answer."""
        if not journal.tally.rows:
            return None
        rows = 0
        for batch in self._source.read():
            if stopped.is_set() or any(not journal.has(record.row_id) for record in batch):
                return None
            rows += len(batch)
        return rows

    @asynccontextmanager
    async def _serving(self, progress: Progress, folder: Path | None) -> AsyncIterator[Server]:
        with _engine_log(folder):
            async with serving(self._settings, progress.say) as server:
                yield server

    def _job(self, sink: Journal | Stream, server: Server, progress: Progress) -> Job:
        request = self._request
        composer = self._composer(request.model or server.model, server.max_model_len)
        composer.check(self._source.columns)
        options = JobOptions(
            order=request.order,
            max_errors=request.max_errors,
            ask=AskOptions(
                concurrency=request.concurrency,
                timeout=self._settings.limits.request_timeout,
                keep_reply=self._plan.format == "openai-batch",
            ),
        )
        return Job(self._source, composer, sink, server, progress, options)

    def _assemble(self, journal: Journal, rows: int, output: Location, stopped: threading.Event) -> None:
        """The output from the input, read once more, and the journal. A local one is whole when it appears."""
        # A journal that was put elsewhere may be on another disk, from which nothing can be renamed into place.
        elsewhere = output.remote or self._request.journal
        new = _beside(output, ".new") if elsewhere else str(journal.folder / "output")
        writer = open_writer(new, self._plan, self._source)
        try:
            records = (record for batch in self._source.read() for record in batch)
            for results in journal.parts(rows, ordered=self._request.ordered):
                if stopped.is_set():
                    raise asyncio.CancelledError
                by_row = {record.row_id: record for record in islice(records, len(results))}
                writer.write([(by_row[result.index], result) for result in results])
            writer.close()
        except BaseException:
            writer.abort()
            raise
        _put_in_place(new, output)

    def _journal_folder(self, output: Location) -> Path:
        if self._request.journal:
            return Path(self._request.journal).expanduser()
        if output.remote:
            name = hashlib.blake2b(output.name.encode(), digest_size=8).hexdigest()
            return self._settings.paths.state_dir / "score" / name
        return Path(f"{output.path}.partial")

    def _finish(self, progress: Progress, restarts: int) -> None:
        summary = progress.summary(self._request.output, restarts)
        progress.say(closing_words(summary))
        if self._request.summary:
            print(json.dumps(asdict(summary)), file=self._messages if self._output is None else sys.stdout, flush=True)


def read_settings(request: ScoreRequest, flags: Flags, environ: Mapping[str, str]) -> Settings:
    """The folder's settings, or those of a server at a URL, whose key comes from the environment."""
    if request.url is None:
        return load(flags, environ, for_files(len(os.sched_getaffinity(0))))
    given = Flags(None, {**flags.options, "upstream": request.url}, flags.params, flags.engine_args)
    settings = resolve(ModelFolder(Path.cwd(), None, None, None), given, environ)
    key = environ.get(_KEY)
    if settings.upstream_key is not None or not key:
        return settings
    parts = urlsplit(request.url)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ConfigurationError(
            f"{_KEY} is set, and would travel to {parts.hostname} in the clear",
            "Use https, unset it, or give the key on purpose with --upstream-key-file.",
        )
    return replace(settings, upstream_key=Secret(key))


def _level(settings: Settings) -> str:
    """Warnings, unless somebody asked for more: the log would push the progress off the screen."""
    chosen = next(setting for setting in settings.settings if setting.name == "logging_level")
    return "WARNING" if chosen.source == "default" and settings.log_level == "INFO" else settings.log_level


def _request_options(request: ScoreRequest) -> RequestOptions:
    return RequestOptions(
        prompt_column=request.prompt_column,
        template=read_template(Path(request.template)) if request.template else None,
        messages_column=request.messages_column,
        params=parse_params(request.params),
        row_params=request.row_params,
        response_format=read_response_format(Path(request.response_format)) if request.response_format else None,
        keep_model=request.url is not None,
    )


def _exists(output: str) -> ConfigurationError:
    return ConfigurationError(f"the output {output} exists", "Choose another one, or write it anew with --restart.")


def _beside(output: Location, ending: str) -> str:
    """A name for what is not whole yet. A remote file does not appear before it is."""
    return output.name if output.remote else output.path + ending


def _put_in_place(new: str, output: Location) -> None:
    if output.remote:
        return
    with writing(output.name):
        Path(new).replace(output.path)
        sync_folder(Path(output.path).parent)


async def _in_thread(work: Callable[[threading.Event], T]) -> T:
    """Run it in a thread. A cancellation sets the event and waits for the thread's end."""
    stopped = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, stopped))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stopped.set()
        await asyncio.gather(task, return_exceptions=True)
        raise


@contextmanager
def _engine_log(folder: Path | None) -> Iterator[None]:
    """Keep what the engine says in a file beside the journal: a terminal with a progress line is no place for it."""
    if folder is None:
        yield
        return
    handler = standard_logging.FileHandler(folder / "engine.log", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(standard_logging.Formatter("%(asctime)s %(message)s"))
    handler.addFilter(logging.REDACTOR)
    log = logging.get("vllm")
    log.propagate = log.isEnabledFor(standard_logging.INFO)  # on the screen too, for who asked for it
    log.setLevel(standard_logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(standard_logging.NOTSET)
        log.propagate = True
        log.removeHandler(handler)
        handler.close()
