"""The server that answers rows: a model folder's own engine, started for this run, or one at a URL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from vllm_dropin.batch.pace import Load, read_load
from vllm_dropin.errors import ConfigurationError, DropinError, EngineAwayError, EngineError
from vllm_dropin.gateway.engine_client import EngineAnswer, EngineClient
from vllm_dropin.gateway.errors import EngineUnavailable
from vllm_dropin.gateway.served import ServedModel
from vllm_dropin.gateway.state import Phase, SharedState
from vllm_dropin.platforms.events import StatusReporter
from vllm_dropin.scoring.scorer import EngineLost
from vllm_dropin.settings.settings import Settings
from vllm_dropin.supervisor.briefing import gateway_config
from vllm_dropin.supervisor.launch import Launch, engine_keeper
from vllm_dropin.supervisor.phases import PhaseBoard
from vllm_dropin.supervisor.runtime import RuntimeFolder
from vllm_dropin.supervisor.supervisor import prepare_state_dir, watch_upstream

_LOOK_TIMEOUT = 2.0
_FIRST_TIMEOUT = 30.0  # a busy server may need long for its first answer; one that is not there says so at once
_READY_POLL = 0.1


class Server:
    """What the scorer asks (scoring.scorer.Completer), with the counts that the pace needs."""

    def __init__(self, client: EngineClient, state: SharedState, life: asyncio.Task[None], model: str | None) -> None:
        self._client = client
        self._state = state
        self._life = life
        self.model = model
        """The name by which it knows its model; None when it tells none."""
        self.refused = 0
        """Answers with status 429 so far."""

    @property
    def generation(self) -> int:
        return self._client.generation

    @property
    def max_model_len(self) -> int | None:
        """The context length, in tokens, that the server tells."""
        return self._state.max_model_len

    @property
    def restarts(self) -> int:
        """How often the engine had to be started again."""
        return self._state.read_status().engine.restarts

    async def chat(self, body: bytes) -> EngineAnswer:
        try:
            answer = await self._client.chat(body)
        except EngineUnavailable as error:
            raise EngineLost(str(error), sent=error.sent) from error
        self.refused += answer.status == 429
        return answer

    async def wait_ready(self, deadline: float) -> bool:
        return await self._client.wait_ready(deadline)

    async def load(self) -> Load | None:
        """What the engine says of its batch; None when it says nothing."""
        try:
            async with self._client.request("GET", "/metrics", timeout=_LOOK_TIMEOUT) as response:
                return read_load(await response.read()) if response.status == 200 else None
        except (EngineUnavailable, TimeoutError):
            return None

    async def ended(self) -> None:
        """Return never, but by the error that ended the engine for good."""
        await asyncio.shield(self._life)


@asynccontextmanager
async def serving(settings: Settings, say: Callable[[str], None]) -> AsyncIterator[Server]:
    """Start the engine, or find the upstream, and give it when it is ready; nothing of it is left afterwards.

    `say` is told of each stage of the start.

    Raises what a start raises (errors.py): HookError, DownloadError, ModelError, EngineError, ConfigurationError.
    """
    runtime = RuntimeFolder.create(settings.paths.runtime_dir)
    state = SharedState.create(runtime.state, 1)
    board = PhaseBoard(state, settings.engine.python.version if settings.engine else None)
    config = gateway_config(settings, runtime)
    client = EngineClient(config, state, state.slots[0])
    if settings.upstream is None:
        life = asyncio.create_task(_keep(settings, runtime, state, board), name="engine")
    else:
        life = asyncio.create_task(_follow(settings, settings.upstream, client, state, board), name="engine")
    try:
        await _until_ready(state, life, say)
        yield Server(client, state, life, await ServedModel(config, client).name())
    finally:
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)
        await client.close()
        runtime.remove()


async def _keep(settings: Settings, runtime: RuntimeFolder, state: SharedState, board: PhaseBoard) -> None:
    prepare_state_dir(settings.paths.state_dir)
    silent = StatusReporter(None, None, None, True)  # a deployment is something else
    site = await Launch(settings, runtime, board, silent).prepare()
    keeper = engine_keeper(settings, site, state, board, silent)
    try:
        await keeper.run()
    except DropinError as error:
        board.fail(error)
        raise
    finally:
        await keeper.stop()


async def _follow(settings: Settings, url: str, client: EngineClient, state: SharedState, board: PhaseBoard) -> None:
    """Check that the upstream lets us in, then follow its health."""
    try:
        async with client.request("GET", "/v1/models", timeout=_FIRST_TIMEOUT) as response:
            status = response.status
    except (EngineUnavailable, TimeoutError):
        raise EngineAwayError(f"{url} does not answer", "Check the URL, and that its server runs.") from None
    if status in (401, 403):
        raise ConfigurationError(
            f"{url} asks for a key (status {status})", "Set OPENAI_API_KEY, or give a file with --upstream-key-file."
        )
    await watch_upstream(lambda: settings, state, board)


async def _until_ready(state: SharedState, life: asyncio.Task[None], say: Callable[[str], None]) -> None:
    said = ""
    while state.phase is not Phase.READY:
        done, _ = await asyncio.wait({life}, timeout=_READY_POLL)
        if done:
            life.result()
            raise EngineError("the engine ended before it was ready")
        status = state.read_status()
        if status.stage and (stage := f"{status.phase}: {status.stage}") != said:
            said = stage
            say(stage)
