"""`score --ray`: the rows that have no answer yet are asked by replicas on a Ray cluster, and kept by this process.

The journal is the one of a run without Ray, so that either may go on with what the other has begun.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from vllm_dropin.batch.job import SYNC_EVERY, AnswerSink, too_many
from vllm_dropin.batch.progress import Progress
from vllm_dropin.batch.ray_cluster import check_nodes, cluster, new_actor
from vllm_dropin.batch.ray_pool import Pool
from vllm_dropin.batch.ray_reading import Answered, Blocks, Reading, at_home
from vllm_dropin.batch.ray_replica import Briefing, Described, Replica
from vllm_dropin.batch.records import CsvOptions, Source
from vllm_dropin.batch.request import ScoreRequest
from vllm_dropin.batch.requests import RequestOptions
from vllm_dropin.engine.command import EnginePlan
from vllm_dropin.scoring.results import RowResult
from vllm_dropin.settings.options import Flags
from vllm_dropin.settings.settings import Settings
from vllm_dropin.supervisor.briefing import generation_defaults

_TICK = 0.1
_STORAGE = ("AWS_", "AZURE_", "GOOGLE_", "FSSPEC_")


@dataclass(frozen=True)
class RayWork:
    """One command, as far as it concerns the cluster."""

    request: ScoreRequest
    flags: Flags
    environ: Mapping[str, str]
    settings: Settings
    options: RequestOptions
    keep_reply: bool


async def score_on_ray(work: RayWork, source: Source, sink: AnswerSink, progress: Progress) -> tuple[int, int]:
    """Answer every row. Gives how many rows the input has, and how often engines had to be started again.

    Raises FailedRowsError, ConfigurationError, and what an engine, the disk or the cluster raise. However it ends, by a
    cancellation too, what was answered is in the sink, and committed.
    """
    request = work.request
    gpus = gpus_of(work.settings.engine)
    answered = await asyncio.to_thread(Answered.among, sink.has, sink.tally.rows)
    async with cluster(request.ray or "") as started:
        if started:
            progress.say("a Ray cluster is started on this machine")
        else:
            await asyncio.to_thread(check_nodes, gpus)
        briefing = Briefing.of(request, work.flags, work.environ, work.settings, keep_reply=work.keep_reply)
        run = _RayRun(work, source, sink, progress)
        pool = Pool(partial(new_actor, Replica, gpus, briefing), request.replicas, run.take, progress.say)
        ticking = asyncio.create_task(run.tick(pool), name="tick")
        answering = asyncio.create_task(pool.run(partial(run.read, answered), alone=work.settings.hook is not None))
        try:
            await asyncio.wait({answering, ticking}, return_when=asyncio.FIRST_COMPLETED)
            for task in (answering, ticking):
                if task.done():
                    await task
        finally:
            for task in (answering, ticking):
                task.cancel()
            await asyncio.gather(answering, ticking, return_exceptions=True)
            progress.end()
            await asyncio.to_thread(sink.sync)
        if request.max_errors.passed(sink.tally, final=True):
            raise too_many(sink.tally, None)
        return run.rows, pool.restarts


class _RayRun:
    def __init__(self, work: RayWork, source: Source, sink: AnswerSink, progress: Progress) -> None:
        self._work = work
        self._source = source
        self._sink = sink
        self._progress = progress
        self._blocks: Blocks | None = None

    @property
    def rows(self) -> int:
        return self._blocks.position.rows if self._blocks else 0

    def read(self, answered: Answered, described: Described) -> Blocks:
        """Begin to read, once it is known what the engine is called and how long its prompts may be."""
        request, options = self._work.request, self._work.options
        template = (options.template.text, request.template or "") if options.template is not None else None
        reading = Reading(
            files=at_home(self._source.files),
            csv=CsvOptions(request.charset),
            options=replace(options, template=None),
            template=template,
            defaults=generation_defaults(self._work.settings.generation).capped(described.max_model_len),
            model=request.model or described.model,
            order=request.order,
            answered=answered,
            environ={name: value for name, value in self._work.environ.items() if name.startswith(_STORAGE)},
        )
        reading.composer.check(self._source.columns)
        self._blocks = Blocks(reading)
        self._progress.begin()
        return self._blocks

    def take(self, result: RowResult) -> None:
        """Keep an answer. Raises FailedRowsError, and what the sink raises."""
        if self._sink.has(result.index):
            return
        self._sink.add(result)
        if result.fault is not None and self._work.request.max_errors.passed(self._sink.tally):
            raise too_many(self._sink.tally, result)

    async def tick(self, pool: Pool) -> None:
        """Show how far it is, and commit what has come."""
        clock = asyncio.get_running_loop().time
        synced = clock()
        while True:
            await asyncio.sleep(_TICK)
            if self._blocks is not None:
                self._progress.show(self._blocks.position, pool.load, pool.in_flight, note=pool.staffing)
            if clock() - synced >= SYNC_EVERY:
                await asyncio.to_thread(self._sink.sync)
                synced = clock()


def gpus_of(plan: EnginePlan | None) -> int:
    """How many GPUs a replica's engine is spread over; 0 without an engine, or with one for CPUs."""
    if plan is None or plan.python.cpu:
        return 0
    gpus = 1
    for dest in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        chosen = plan.parallel if plan.parallel is not None and plan.parallel.dest == dest else plan.last(dest)
        if chosen is not None and chosen.tokens:
            size = chosen.tokens[-1].rpartition("=")[2]
            gpus *= int(size) if size.isdigit() else 1
    return gpus
