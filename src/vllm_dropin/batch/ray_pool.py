"""The replicas of one run, seen from the driver: hired, given blocks of rows, heard, and replaced when they are lost.

Ray Data has a pool of actors too. It ties a block to the actor that has begun it: when that actor's node dies, its rows
wait until the cluster has a place for it again, however many other replicas are idle. Here they go to those at once,
row by row: only what had no answer yet.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from vllm_dropin.batch.pace import FIRST, Load
from vllm_dropin.batch.ray_errors import Told, in_short
from vllm_dropin.batch.ray_reading import BLOCK_ROWS, Block, Blocks
from vllm_dropin.batch.ray_replica import Described, Report
from vllm_dropin.batch.request import Replicas
from vllm_dropin.errors import ConfigurationError, DropinError, EngineError
from vllm_dropin.scoring.results import RowResult

_PATIENCE = 3
"""Replicas that may end one after the other without an answer in between, before no more are started."""
_CLOSING = 20.0
"""Seconds for engines to stop by themselves."""
_NO_PLACE_AFTER = 15.0
"""Seconds until it is said that the cluster has no place for a replica."""


@dataclass(eq=False)
class _Member:
    """One replica. `asked` has the block of each row that it has and has not answered."""

    number: int
    actor: Any
    node: str = "a node"
    begun: bool = False
    stage: str = ""
    ready: bool = False
    limit: int = FIRST
    load: Load | None = None
    restarts: int = 0
    asked: dict[int, Block] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """How many rows more it should have: what fills its engine, and what keeps it full until the next block."""
        return self.limit + max(self.limit // 2, BLOCK_ROWS) - len(self.asked)

    def unanswered(self) -> list[Block]:
        left: dict[int, tuple[Block, set[int]]] = {}
        for row_id, block in self.asked.items():
            left.setdefault(id(block), (block, set()))[1].add(row_id)
        return [block.only(row_ids) for block, row_ids in left.values()]


class Pool:
    """`run` once. `hire` makes an actor; `take` keeps an answer, and may raise to end the run; `say` tells the user."""

    def __init__(
        self,
        hire: Callable[[], Any],
        replicas: Replicas,
        take: Callable[[RowResult], None],
        say: Callable[[str], None],
    ) -> None:
        self._hire = hire
        self._replicas = replicas
        self._take = take
        self._say = say
        self._members: list[_Member] = []
        self._tending: dict[_Member, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._waiting: deque[Block] = deque()
        self._reading = True
        self._moved = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._first: asyncio.Future[Described] = loop.create_future()
        self._end: asyncio.Future[None] = loop.create_future()
        self._hired = 0
        self._ended_in_a_row = 0
        self._restarts_before = 0

    async def run(self, read: Callable[[Described], Blocks], alone: bool) -> None:
        """Answer all questions. `read` opens them once a replica has told what shapes them.

        `alone`: the first replica has to be ready before there are others. Raises what `take`, the reading and the
        replicas raise.
        """
        blocks: Blocks | None = None
        feeding: asyncio.Task[None] | None = None
        try:
            for _ in range(1 if alone else self._replicas.minimum):
                self._add()
            either: set[asyncio.Future[Any]] = {self._first, self._end}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not self._end.done():
                blocks = read(self._first.result())
                feeding = asyncio.create_task(self._feed(blocks), name="feed")
            await self._end
        finally:
            if blocks is not None:
                blocks.stop()
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
            await self._close(list(self._members))
            await asyncio.gather(*self._leaving)

    @property
    def in_flight(self) -> int:
        return sum(len(member.asked) for member in self._members)

    @property
    def load(self) -> Load | None:
        """Of all engines together; None where none says it."""
        loads = [member.load for member in self._members if member.load is not None]
        if not loads:
            return None
        return Load(sum(load.running for load in loads), sum(load.waiting for load in loads))

    @property
    def restarts(self) -> int:
        """How often engines had to be started again, those of replicas that are gone among them."""
        return self._restarts_before + sum(member.restarts for member in self._members)

    @property
    def staffing(self) -> str:
        """How many replicas there are, in words."""
        ready = sum(member.ready for member in self._members)
        starting = len(self._members) - ready
        words = "1 replica" if ready == 1 else f"{ready} replicas"
        return f"{words}, {starting} starting" if starting else words

    def _add(self) -> None:
        self._hired += 1
        member = _Member(self._hired, self._hire())
        self._members.append(member)
        self._tending[member] = asyncio.create_task(self._tend(member), name=f"replica-{member.number}")

    async def _feed(self, blocks: Blocks) -> None:
        try:
            while True:
                while len(self._waiting) > len(self._members):
                    self._moved.clear()
                    await self._moved.wait()
                block = await blocks.next()
                if block is None:
                    break
                self._waiting.append(block)
                self._share_out()
            self._reading = False
            self._share_out()
        except DropinError as error:
            self._finish(error)

    async def _tend(self, member: _Member) -> None:
        """Hear a replica until it ends."""
        try:
            while (told := await self._follow(member)) is None:
                pass
            self._lose(member, told.error(f"replica {member.number} on {member.node}"), lost=False)
        except ray.exceptions.RayError as error:
            problem = f"replica {member.number} on {member.node} is lost: {in_short(error)}"
            self._lose(member, EngineError(problem, "Every answer is kept: give the same command again."), lost=True)
        except Exception as error:  # noqa: BLE001 (the journal's, or --max-errors: it ends the run)
            self._finish(error)

    async def _follow(self, member: _Member) -> Told | None:
        """Its next report; how it ended, when it has."""
        if not member.begun:
            begun = asyncio.ensure_future(_begun(member))
            try:
                if not (await asyncio.wait({begun}, timeout=_NO_PLACE_AFTER))[0]:
                    self._say(f"replica {member.number} waits for a place in the cluster")
                member.node = await begun
            finally:
                begun.cancel()
            member.begun = True
        report: Report = await member.actor.report.remote()
        self._heed(member, report)
        return report.told

    def _heed(self, member: _Member, report: Report) -> None:
        member.limit, member.load = report.limit, report.load
        member.restarts = report.restarts
        if report.stage != member.stage and not member.ready:
            member.stage = report.stage
            if not self._first.done() and member is self._members[0]:
                self._say(f"replica {member.number} on {member.node}: {report.stage}")
        if report.described is not None and not member.ready:
            member.ready = True
            self._say(f"replica {member.number} on {member.node} is ready")
            if not self._first.done():
                self._first.set_result(report.described)
        for result in report.results:
            self._ended_in_a_row = 0
            if member.asked.pop(result.index, None) is not None:
                self._take(result)
        self._share_out()

    def _lose(self, member: _Member, problem: DropinError, *, lost: bool) -> None:
        """Give a replica's rows to the others, and start another one in its place."""
        self._members.remove(member)
        del self._tending[member]
        with contextlib.suppress(Exception):  # it is gone
            ray.kill(member.actor)
        self._restarts_before += member.restarts
        self._waiting.extendleft(reversed(member.unanswered()))
        self._ended_in_a_row += 1
        others = any(other.ready for other in self._members)
        given_up = self._ended_in_a_row >= _PATIENCE
        if isinstance(problem, ConfigurationError) or not (others or (lost and not given_up)):
            self._finish(problem)
            return
        self._say(f"{problem.message}; {len(member.asked)} rows go to other replicas")
        if given_up:
            self._say("no other replica is started in its place")
        self._share_out()

    def _share_out(self) -> None:
        """Give out what waits, each block to the replica that has the most room, and fit their number to the work."""
        ready = [member for member in self._members if member.ready]
        while self._waiting and ready:
            member = max(ready, key=lambda member: member.room)
            if member.room <= 0:
                break
            block = self._waiting.popleft()
            member.asked.update(dict.fromkeys(block.row_ids, block))
            member.actor.ask.remote(block.table)
        self._moved.set()
        self._staff()
        if not (self._reading or self._waiting or self.in_flight):
            self._finish(None)

    def _staff(self) -> None:
        if not self._first.done() and self._members:
            return
        if self._waiting or self._reading:
            ready = sum(member.ready for member in self._members)
            useful = self._replicas.maximum if self._reading else ready + len(self._waiting)
            wanted = min(max(useful if self._waiting else 0, self._replicas.minimum), self._replicas.maximum)
            while len(self._members) < wanted and self._ended_in_a_row < _PATIENCE and not self._end.done():
                self._add()
            return
        surplus = max(0, len(self._members) - self._replicas.minimum)
        idle = sorted((member for member in self._members if not member.asked), key=lambda member: member.ready)
        for member in idle[:surplus]:
            self._dismiss(member)

    def _dismiss(self, member: _Member) -> None:
        """Let go of a replica for which there is no work left."""
        self._members.remove(member)
        self._restarts_before += member.restarts
        closing = asyncio.create_task(self._close([member]))
        self._leaving.add(closing)
        closing.add_done_callback(self._leaving.discard)

    def _finish(self, error: Exception | None) -> None:
        if self._end.done():
            return
        if error is None:
            self._end.set_result(None)
        else:
            self._end.set_exception(error)
            self._end.exception()  # a cancelled `run` does not ask for it, and asyncio would complain

    async def _close(self, members: list[_Member]) -> None:
        """Stop engines, and their actors."""
        tending = [self._tending.pop(member) for member in members if member in self._tending]
        for task in tending:
            task.cancel()
        await asyncio.gather(*tending, return_exceptions=True)
        stopping = [asyncio.ensure_future(_closed(member)) for member in members if member.begun]
        if stopping:
            await asyncio.wait(stopping, timeout=_CLOSING)
        for member in members:
            with contextlib.suppress(Exception):
                ray.kill(member.actor)


async def _begun(member: _Member) -> str:
    """The address of its node."""
    node_id = await member.actor.begin.remote()
    nodes = await asyncio.to_thread(ray.nodes)
    return next((str(node["NodeManagerAddress"]) for node in nodes if node["NodeID"] == node_id), "a node")


async def _closed(member: _Member) -> None:
    with contextlib.suppress(ray.exceptions.RayError):
        await member.actor.close.remote()
