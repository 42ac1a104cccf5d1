"""Row scoring over HTTP: `/predict/`, `/predictions/` and `/invocations` (contract, section 3)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, closing
from typing import TypeVar

from vllm_dropin import logging
from vllm_dropin.errors import EncodingError, TableError
from vllm_dropin.gateway.config import GatewayConfig
from vllm_dropin.gateway.engine_client import EngineAnswer, EngineClient, EngineUnavailable
from vllm_dropin.gateway.errors import PIPELINE_ERROR, Header, HttpError, Receive, Scope, Send, retry_after
from vllm_dropin.gateway.limits import Body, Hold, read_body
from vllm_dropin.gateway.request import while_connected
from vllm_dropin.gateway.served import ServedModel
from vllm_dropin.gateway.state import Phase, SharedState, Slot
from vllm_dropin.gateway.upload import Upload, open_upload, unusable
from vllm_dropin.scoring import formats
from vllm_dropin.scoring.gate import Gate
from vllm_dropin.scoring.prompts import chat_body
from vllm_dropin.scoring.results import Fault, RowResult
from vllm_dropin.scoring.rows import Row, Survey, read_rows, survey
from vllm_dropin.scoring.scorer import EngineLost, Scorer

_log = logging.get("predictions")

NAMED_ROWS = 10  # failed rows that a message names
_THREAD_ABOVE = 256 << 10  # bytes; parsing more than this would hold up every stream of this worker
# bytes; reading a file lets other threads run now and then, reading from memory does not, and a cell may have millions
# of lines
_SPOOL_ABOVE = 1 << 20
# bytes; what a request costs us beside its body, which may be one row: nothing else bounds how many are here at once
_REQUEST_BYTES = 64 << 10
_BATCH_ROWS = 64
_PLACE_POLL = 0.01  # seconds; a place freed by another worker is only seen by looking
_T = TypeVar("_T")


class Predictions:
    """Scores the rows of a CSV. Raises HttpError (bodies of the form {"message"}) and ClientGone; the app answers.

    Rows have a bound of their own, `row_concurrency`, shared by all requests and workers. They wait for an engine that
    restarts, and are sent to it again; only the first load is answered with 503.
    """

    def __init__(
        self, config: GatewayConfig, state: SharedState, slot: Slot, engine: EngineClient, served: ServedModel
    ) -> None:
        self._config = config
        self._state = state
        self._slot = slot
        self._engine = _RowEngine(config, state, slot, engine)
        self._served = served
        self._hold = Hold(state, slot, config.limits.held_bytes)
        self._gate = Gate(config.limits.row_concurrency)
        self._spool_above = min(config.limits.spool_above, _SPOOL_ABOVE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._require_service()
        limits = self._config.limits
        headers = dict(scope["headers"])
        with self._hold.during(_REQUEST_BYTES):
            body = await read_body(
                receive,
                headers,
                limits.row_body,
                spool_above=self._spool_above,
                grace=limits.body_grace,
                hold=self._hold,
            )
            with body:
                self._require_service()  # a slow upload can outlast it
                await while_connected(receive, self._answer(body, headers, send))

    def _require_service(self) -> None:
        """Raises HttpError unless rows can be scored, now or after a restart."""
        if self._config.target_type.lower() != "textgeneration":
            raise unusable(f"rows are scored for the target type textgeneration, not {self._config.target_type}")
        phase = self._state.phase
        if phase is Phase.FAILED:
            cause = self._state.read_status().error
            raise HttpError(PIPELINE_ERROR, f"ERROR: {cause.message if cause else 'the engine has failed'}")
        if self._state.draining or phase.final:
            raise HttpError(503, "the server is shutting down", [retry_after(5)])
        if phase not in (Phase.READY, Phase.RESTARTING):
            raise HttpError(503, f"the engine is not ready: {phase.label}", [retry_after(5)])

    async def _answer(self, body: Body, headers: dict[bytes, bytes], send: Send) -> None:
        upload = await _off_loop(body.size, lambda: open_upload(body.open(), headers, self._spool_above))
        with closing(upload):
            table = await self._survey(upload, body.size)
            self._slot.add("rows_in_flight", table.rows)
            try:
                with closing(_Answers(self._config.generation.n or 1, self._slot)) as answers:
                    await self._score(upload, body.size, answers)
                    await self._send(answers, send)
            finally:
                self._slot.add("rows_in_flight", -table.rows)

    async def _survey(self, upload: Upload, size: int) -> Survey:
        """Read the whole table before the engine is asked about any of it. Raises HttpError 400 or 422."""
        column = self._config.generation.prompt_column_name
        try:
            table = await _off_loop(size, lambda: survey(upload.file, column, upload.charset, keep=NAMED_ROWS))
        except EncodingError as error:
            raise HttpError(400, f"ERROR: {_sentence(error)}") from error
        except TableError as error:
            raise unusable(_sentence(error)) from error
        if table.faulty and (table.faulty == table.rows or self._config.row_errors == "fail"):
            self._slot.add("rows", table.rows)
            self._slot.add("row_errors", table.faulty)
            named = [(row.index, row.line, row.fault or "") for row in table.first]
            raise unusable(_naming(table.faulty, table.rows, named))
        return table

    async def _score(self, upload: Upload, size: int, answers: _Answers) -> None:
        defaults = self._config.generation.capped(self._state.max_model_len or self._config.max_model_len)
        model = await self._served.name()
        scorer = Scorer[Row](
            self._engine,
            lambda row: chat_body(row.prompt, defaults, model),
            self._gate,
            timeout=self._config.limits.request_timeout,
        )
        rows = _one_by_one(read_rows(upload.file, defaults.prompt_column_name, upload.charset), size)
        async with aclosing(scorer.score(rows)) as results:
            async for result in results:
                answers.add(result)
        if answers.failed:
            _log.warning("%d of %d rows failed", answers.failed, answers.spool.rows)

    async def _send(self, answers: _Answers, send: Send) -> None:
        if answers.failed and answers.failed == answers.spool.rows:
            raise answers.total_failure()
        if answers.failed and self._config.row_errors == "fail":
            raise unusable(answers.naming())
        form = self._config.deployment
        pieces = (
            formats.predictions(answers.spool) if form is None else formats.deployment(answers.spool, form.target_name)
        )
        headers = [(b"x-row-errors", str(answers.failed).encode())] if answers.failed else []
        await _send_pieces(send, pieces, headers)


class _Answers:
    """The results of one request so far, with this worker's counters kept in step."""

    def __init__(self, n: int, slot: Slot) -> None:
        self.spool = formats.Spool(n)
        self._slot = slot
        self._held = 0
        self._faults: set[Fault] = set()
        self._first: list[tuple[int, int, str]] = []

    @property
    def failed(self) -> int:
        return self.spool.failed

    def add(self, result: RowResult) -> None:
        size = self.spool.add(result)
        self._held += size
        # Counted, never refused: a request that was admitted is finished (decision 7 bounds what is admitted).
        self._slot.add("held_bytes", size)
        self._slot.add("rows")
        if result.tries > 1:
            self._slot.add("engine_retries", result.tries - 1)
        if result.fault is None:
            return
        self._slot.add("row_errors")
        self._faults.add(result.fault)
        if len(self._first) < NAMED_ROWS:
            self._first.append((result.index, result.line, result.error or ""))

    def naming(self) -> str:
        return _naming(self.failed, self.spool.rows, self._first)

    def total_failure(self) -> HttpError:
        """No row has an answer: 422 when every row is at fault, 503 when the engine is away, else 502."""
        if self._faults == {Fault.INPUT}:
            return unusable(self.naming())
        if Fault.UNAVAILABLE in self._faults:
            return HttpError(503, f"ERROR: {self.naming()}", [retry_after(5)])
        return HttpError(502, f"ERROR: {self.naming()}")

    def close(self) -> None:
        self._slot.add("held_bytes", -self._held)
        self.spool.close()


class _RowEngine:
    """The engine as the scorer wants it; keeps the bound on rows over all workers."""

    def __init__(self, config: GatewayConfig, state: SharedState, slot: Slot, engine: EngineClient) -> None:
        self._limit = config.limits.row_concurrency
        self._state = state
        self._slot = slot
        self._engine = engine

    @property
    def generation(self) -> int:
        return self._engine.generation

    async def wait_ready(self, deadline: float) -> bool:
        return await self._engine.wait_ready(deadline)

    async def chat(self, body: bytes) -> EngineAnswer:
        # Only ever true with several workers: one worker's gate has this size.
        while self._state.total("rows_at_engine") >= self._limit:  # noqa: ASYNC110 (set by other processes)
            await asyncio.sleep(_PLACE_POLL)
        self._slot.add("rows_at_engine")
        try:
            return await self._engine.chat(body)
        except EngineUnavailable as error:
            raise EngineLost(str(error), sent=error.sent) from error
        finally:
            self._slot.add("rows_at_engine", -1)


async def _off_loop(size: int, work: Callable[[], _T]) -> _T:
    """Run it here, or in a thread when there are many bytes to go through."""
    return await asyncio.to_thread(work) if size > _THREAD_ABOVE else work()


async def _one_by_one(rows: Iterator[Row], size: int) -> AsyncIterator[Row]:
    """The rows of a table of `size` bytes, without holding up the event loop."""
    while batch := await _off_loop(size, lambda: _batch(rows)):
        for row in batch:
            yield row


def _batch(rows: Iterator[Row]) -> list[Row]:
    """The next rows: a few, or one when it is large."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.prompt)
        if len(batch) >= _BATCH_ROWS or characters >= _THREAD_ABOVE:
            break
    return batch


async def _send_pieces(send: Send, pieces: Iterator[bytes], headers: Iterable[Header]) -> None:
    """A JSON document: with its length when it is one piece, else chunked."""
    piece = next(pieces)
    following = next(pieces, None)
    start = [(b"content-type", b"application/json"), *headers]
    if following is None:
        start.append((b"content-length", str(len(piece)).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": start})
    while following is not None:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        piece, following = following, next(pieces, None)
    await send({"type": "http.response.body", "body": piece})


def _naming(failed: int, rows: int, first: Iterable[tuple[int, int, str]]) -> str:
    """A sentence that names the first failed rows: place from 0, line of the file, reason."""
    named = [f"row {index} (line {line}): {error}" for index, line, error in first]
    more = f"; and {failed - len(named)} more" if failed > len(named) else ""
    return f"{failed} of {rows} rows failed: {'; '.join(named)}{more}"


def _sentence(error: TableError) -> str:
    return f"{error.message}; {error.remedy}" if error.remedy else error.message
