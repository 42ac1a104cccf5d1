"""What runs on the nodes of a Ray cluster: a model folder's engine, or the way to a server, with a scorer before it.

The driver (ray_pool.py) hands it blocks of questions and takes the answers away as they come; nothing is kept here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace

from vllm_dropin import logging
from vllm_dropin.batch.asking import Asking, AskOptions, Question
from vllm_dropin.batch.pace import FIRST, Load
from vllm_dropin.batch.ray_errors import Told
from vllm_dropin.batch.ray_reading import Table, questions_of
from vllm_dropin.batch.request import ScoreRequest
from vllm_dropin.batch.server import Server, serving
from vllm_dropin.batch.work import engine_fingerprint
from vllm_dropin.errors import ConfigurationError, DropinError
from vllm_dropin.logging import get
from vllm_dropin.model.secret import Secret
from vllm_dropin.scoring.results import RowResult
from vllm_dropin.settings.options import OPTIONS, Flags
from vllm_dropin.settings.settings import Settings

_HEARTBEAT = 1.0
"""Seconds after which a report is made though nothing has happened: the driver looks whether the pace has changed."""
_GROUP_BYTES = 64 << 10
"""Of answers in one report: Ray sends less than 100 KiB straight to the caller, more by way of a store that dies with
its node."""
_TRAVELS = ("VLLM_", "MLOPS_RUNTIME_PARAM_", "HF_", "HUGGING_FACE_")
_OF_ONE_MACHINE = ("OPENAI_PORT", "OMP_NUM_THREADS")

log = get("ray")


@dataclass(frozen=True)
class Briefing:
    """What makes all replicas one: each finds the folder on its own node, and has to find the same there."""

    request: ScoreRequest
    flags: Flags
    environ: Mapping[str, str] = field(repr=False)
    """Variables of the driver's that say something about the folder, the hub or the engine."""
    key: str | None = field(repr=False)
    fingerprint: Mapping[str, object]
    ask: AskOptions

    @classmethod
    def of(
        cls, request: ScoreRequest, flags: Flags, environ: Mapping[str, str], settings: Settings, *, keep_reply: bool
    ) -> Briefing:
        """The driver's. Its secrets go along in the clear: whoever runs the cluster could read them anyway."""
        names = {name for option in OPTIONS for name in option.variables}
        # The key has been read, and its file need not be on every node.
        options = {name: value for name, value in flags.options.items() if name != "upstream_key_file"}
        return cls(
            request=request,
            flags=replace(flags, options=options),
            environ={
                name: value
                for name, value in environ.items()
                if name.startswith(_TRAVELS) or name in names or name == "OMP_NUM_THREADS"
            },
            key=settings.upstream_key.reveal() if settings.upstream_key else None,
            fingerprint=engine_fingerprint(settings, request.model),
            ask=AskOptions(request.concurrency, settings.limits.request_timeout, keep_reply),
        )

    def settings(self) -> Settings:
        """The folder's settings on this node. Raises ConfigurationError when it is not the driver's folder."""
        from vllm_dropin.batch.run import read_settings

        # Ray gives every worker one OpenMP thread, and two engines on a node can't have one port.
        here = {name: value for name, value in os.environ.items() if name not in _OF_ONE_MACHINE}
        settings = read_settings(self.request, self.flags, {**here, **self.environ})
        found = engine_fingerprint(settings, self.request.model)
        for name, wanted in self.fingerprint.items():
            if found.get(name) != wanted:
                raise ConfigurationError(
                    f"the model folder is another one there: {name} is {found.get(name)}, the driver's is {wanted}",
                    "Give every node the same folder at the same path, and the same vLLM.",
                )
        return replace(settings, upstream_key=Secret(self.key) if self.key else None)


@dataclass(frozen=True)
class Described:
    """What the engine says of its model, which shapes the requests."""

    model: str | None
    max_model_len: int | None


@dataclass(frozen=True)
class Report:
    """What is new since the last one. `limit` rows may be at the engine at once; `told` is how the replica ended."""

    stage: str
    described: Described | None
    results: tuple[RowResult, ...]
    limit: int
    load: Load | None
    restarts: int
    told: Told | None


class Replica:
    """One actor. `begin` it, `ask` it blocks, and call `report` again and again; `close` it."""

    def __init__(self, briefing: Briefing) -> None:
        self._briefing = briefing
        self._blocks: asyncio.Queue[list[Question]] = asyncio.Queue()
        self._results: list[RowResult] = []
        self._news = asyncio.Event()
        self._stage = ""
        self._asking: Asking | None = None
        self._server: Server | None = None
        self._described: Described | None = None
        self._told: Told | None = None
        self._life: asyncio.Task[None] | None = None

    async def begin(self) -> str:
        """Start the engine; reports say how it goes. Gives the id of the node."""
        import ray

        self._life = asyncio.create_task(self._live(), name="replica")
        return str(ray.get_runtime_context().get_node_id())

    async def ask(self, table: Table) -> None:
        """Queue the questions of a block."""
        if questions := list(questions_of(table)):
            self._blocks.put_nowait(questions)

    async def report(self) -> Report:
        """Answers as soon as there are any; what else there is after a second."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HEARTBEAT):
                await self._news.wait()
        self._news.clear()
        results = self._take_group()
        if self._results:
            self._news.set()
        return Report(
            self._stage,
            self._described,
            results,
            self._asking.limit if self._asking else FIRST,
            self._asking.load if self._asking else None,
            self._server.restarts if self._server else 0,
            None if self._results else self._told,
        )

    async def close(self) -> None:
        """Stop the engine."""
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)

    def _take_group(self) -> tuple[RowResult, ...]:
        size = count = 0
        for result in self._results:
            size += 200 + len(result.reply or b"") + sum(map(len, result.completions))
            if count and size > _GROUP_BYTES:
                break
            count += 1
        group = tuple(self._results[:count])
        del self._results[:count]
        return group

    async def _live(self) -> None:
        try:
            settings = await asyncio.to_thread(self._briefing.settings)
            logging.setup(settings.log_level)
            logging.REDACTOR.learn(settings.secrets())
            async with serving(settings, self._say) as server:
                self._server = server
                self._asking = asking = Asking(server, self._briefing.ask)
                self._described = Described(server.model, server.max_model_len)
                self._news.set()
                await asking.run(self._questions(asking), self._take)
        except DropinError as error:
            self._told = Told.of(error)
        except Exception as error:
            log.exception("the replica has failed")
            self._told = Told("EngineError", f"{type(error).__name__}: {error}")
        finally:
            self._news.set()

    def _say(self, stage: str) -> None:
        self._stage = stage
        self._news.set()

    def _take(self, result: RowResult) -> None:
        self._results.append(result)
        self._news.set()

    async def _questions(self, asking: Asking) -> AsyncIterator[Question]:
        block = await self._blocks.get()
        await asking.warm(block)
        while True:
            for question in block:
                yield question
            block = await self._blocks.get()
