"""The input as a Ray dataset of questions: read and composed in one task on the driver's node, block after block.

One task, because a row's number is its place among all rows of all inputs, and on the driver's node, because that is
where the files were found. It is far faster than any engine, and Ray Data keeps it a few blocks ahead of the replicas.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from vllm_dropin.batch.asking import Question
from vllm_dropin.batch.inputs import InputFile
from vllm_dropin.batch.order import WINDOW_BYTES, WINDOW_ROWS, Order, arrange
from vllm_dropin.batch.progress import Position
from vllm_dropin.batch.ray_errors import Told, in_short
from vllm_dropin.batch.records import CsvOptions, Source
from vllm_dropin.batch.requests import Composer, RequestOptions
from vllm_dropin.batch.templates import PromptTemplate
from vllm_dropin.errors import DropinError, InputOutputError
from vllm_dropin.scoring.prompts import GenerationDefaults

BLOCK_ROWS = 64
"""Rows that go to a replica together: few enough that the last ones are shared out evenly."""
_BLOCK_BYTES = 256 << 10
"""What Ray Data gathers before it hands a block on: its own 128 MiB would let the engines wait for the first."""
_AHEAD = 8  # blocks between the reading thread and the replicas
_END, _BROKEN = -1, -2
"""Row numbers of the last block, which has no questions: how many rows there were, or what stopped the reading."""
Table = Any


@dataclass(frozen=True)
class Answered:
    """Which rows are answered, as the half-open ranges of their numbers: `starts` and `stops`, ascending."""

    starts: tuple[int, ...] = ()
    stops: tuple[int, ...] = ()

    @classmethod
    def among(cls, has: Callable[[int], bool], count: int) -> Answered:
        """Of the `count` rows for which `has` is true."""
        starts: list[int] = []
        stops: list[int] = []
        row_id = 0
        inside = False
        while count or inside:
            if has(row_id) is not inside:
                (stops if inside else starts).append(row_id)
                inside = not inside
            count -= inside
            row_id += 1
        return cls(tuple(starts), tuple(stops))

    def has(self, row_id: int) -> bool:
        place = bisect.bisect_right(self.starts, row_id) - 1
        return place >= 0 and row_id < self.stops[place]


@dataclass(frozen=True)
class Reading:
    """All that the reading task has to know. A template travels as its text and name, and is compiled there."""

    files: tuple[InputFile, ...]
    csv: CsvOptions
    options: RequestOptions
    template: tuple[str, str] | None
    defaults: GenerationDefaults
    model: str | None
    order: Order
    answered: Answered
    environ: Mapping[str, str] = field(repr=False)
    """Where credentials of remote storage are: the task would else have those of whoever started Ray."""

    @property
    def composer(self) -> Composer:
        options = self.options
        if self.template is not None:
            options = replace(options, template=PromptTemplate(*self.template))
        return Composer(options, self.defaults, self.model, self.files[0].format)


def at_home(files: Sequence[InputFile]) -> tuple[InputFile, ...]:
    """The same files for a process that works in another folder."""
    return tuple(
        replace(file, location=replace(file.location, path=os.path.abspath(file.location.path)))  # noqa: PTH100
        if file.location is not None and file.location.remote is None
        else file
        for file in files
    )


def tables(reading: Reading) -> Iterator[Table]:
    """What the task yields: the questions in the order in which they are to be sent, then the end.

    It must say the same when it is run again: Ray does so to replace blocks that were lost.
    """
    os.environ.update(reading.environ)
    try:
        source = Source(reading.files, reading.csv)
        composer = reading.composer
        composer.check(source.columns)
        reader = _Reader(source, composer, reading)
        for window in reader.windows():
            for first in range(0, len(window), BLOCK_ROWS):
                yield _table(window[first : first + BLOCK_ROWS], reader.rows, source.position)
        yield _table([Question(_END, 0, "", None)], reader.rows, source.position)
    except DropinError as error:
        yield _table([Question(_BROKEN, 0, Told.of(error).to_json(), None)], 0, (0, 0))


class _Reader:
    def __init__(self, source: Source, composer: Composer, reading: Reading) -> None:
        self.rows = 0
        self._source = source
        self._composer = composer
        self._reading = reading

    def windows(self) -> Iterator[list[Question]]:
        """What is to be asked, window after window."""
        window: list[Question] = []
        size = 0
        order, answered = self._reading.order, self._reading.answered
        for batch in self._source.read():
            for record in batch:
                self.rows += 1
                if answered.has(record.row_id):
                    continue
                composed = self._composer.compose(record)
                window.append(Question(record.row_id, 0, composed.text, composed.error, composed.body))
                size += len(composed.body) + len(composed.text)
            if len(window) >= WINDOW_ROWS or size >= WINDOW_BYTES:
                yield arrange(window, order, last=False)
                window, size = [], 0
        yield arrange(window, order, last=True)


def _table(questions: Sequence[Question], rows: int, position: tuple[int, int]) -> Table:
    import pyarrow

    done, total = position
    count = len(questions)
    return pyarrow.table(
        {
            "row_id": pyarrow.array([question.index for question in questions], pyarrow.int64()),
            "body": pyarrow.array([question.body for question in questions], pyarrow.large_binary()),
            # Half of a surrogate pair is no UTF-8, which Arrow's text has to be.
            "prompt": pyarrow.array(
                [question.prompt.encode("utf-8", "surrogatepass") for question in questions], pyarrow.large_binary()
            ),
            "error": pyarrow.array([question.error for question in questions], pyarrow.large_string()),
            "rows": pyarrow.array([rows] * count, pyarrow.int64()),
            "done": pyarrow.array([done] * count, pyarrow.int64()),
            "total": pyarrow.array([total] * count, pyarrow.int64()),
        }
    )


def questions_of(table: Table) -> Iterator[Question]:
    """The questions in a block, where they are asked."""
    columns = (table.column(name).to_pylist() for name in ("row_id", "prompt", "error", "body"))
    for row_id, prompt, error, body in zip(*columns, strict=True):
        yield Question(row_id, 0, prompt.decode("utf-8", "surrogatepass"), error, body)


@dataclass(frozen=True)
class Block:
    """Some questions: `row_ids` in their order, and the Arrow table that holds them."""

    table: Table
    row_ids: tuple[int, ...]

    def only(self, row_ids: set[int]) -> Block:
        """The questions about these rows."""
        places = [place for place, row_id in enumerate(self.row_ids) if row_id in row_ids]
        return Block(self.table.take(places), tuple(self.row_ids[place] for place in places))


class Blocks:
    """The dataset's blocks for an event loop; a thread of its own waits for Ray Data."""

    def __init__(self, reading: Reading) -> None:
        self.position = Position(0, 0, 0)
        """How far the reading is; after the last block `rows` is how many the input has."""
        self._reading = reading
        self._loop = asyncio.get_running_loop()
        self._came: asyncio.Queue[Table | DropinError] = asyncio.Queue()
        self._room = threading.Semaphore(_AHEAD)
        self._stopped = False
        # A daemon: Ray Data can't be interrupted while it waits for its task, and the end of Ray frees it.
        threading.Thread(target=self._pump, name="ray-data", daemon=True).start()

    async def next(self) -> Block | None:
        """The next block; None after the last. Raises what the reading raised."""
        table = await self._came.get()
        self._room.release()
        if isinstance(table, DropinError):
            raise table
        row_ids = tuple(table.column("row_id").to_pylist())
        if row_ids[0] == _BROKEN:
            raise Told.from_json(table.column("prompt")[0].as_py()).error()
        rows, done, total = (table.column(name)[-1].as_py() for name in ("rows", "done", "total"))
        self.position = Position(rows, done, total)
        if row_ids[0] == _END:
            return None
        return Block(table, row_ids)

    def stop(self) -> None:
        """No further blocks are wanted."""
        self._stopped = True
        self._room.release()

    def _pump(self) -> None:
        try:
            for table in _dataset(self._reading).iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=1
            ):
                for piece in _pieces(table):
                    self._room.acquire()
                    if self._stopped:
                        return
                    self._tell(piece)
        except Exception as error:  # noqa: BLE001 (Ray raises many kinds; all of them end the reading)
            self._tell(InputOutputError(f"Ray could not read the input: {in_short(error)}", "Give the command again."))

    def _tell(self, what: Table | DropinError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile: nobody is left to hear it
            self._loop.call_soon_threadsafe(self._came.put_nowait, what)


def _pieces(table: Table) -> Iterator[Table]:
    """A block as Ray gathered it in ours; the end mark is one of its own."""
    row_ids = table.column("row_id").to_pylist()
    count = len(row_ids) - (row_ids[-1] < 0)
    for first in range(0, count, BLOCK_ROWS):
        yield table.slice(first, min(BLOCK_ROWS, count - first))
    if count < len(row_ids):
        yield table.slice(count)


def _dataset(reading: Reading) -> Any:
    import ray.data
    from ray.data.block import BlockMetadata

    class Questions(ray.data.Datasource):  # type: ignore[misc]
        def get_read_tasks(self, *_: object, **__: object) -> list[Any]:
            unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
            return [ray.data.ReadTask(partial(tables, reading), unknown)]

        def estimate_inmemory_data_size(self) -> None:
            return None

        @property
        def supports_distributed_reads(self) -> bool:
            return False

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = _BLOCK_BYTES
    # No CPU of Ray's count: on a cluster whose head has none to give it could not be read there.
    return ray.data.read_datasource(Questions(), override_num_blocks=1, num_cpus=0)
