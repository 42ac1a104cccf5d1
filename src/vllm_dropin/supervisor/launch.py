"""From settings to an engine that can be started: hook, model, download, weights, command. Each at most once."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path

from vllm_dropin.engine.command import EnginePlan, build
from vllm_dropin.engine.weights import check_weights
from vllm_dropin.gateway.state import Phase, SharedState
from vllm_dropin.logging import REDACTOR, get
from vllm_dropin.model import hashes, manifest
from vllm_dropin.model.credential import is_secret_name
from vllm_dropin.model.manifest import Verification
from vllm_dropin.platforms.events import StatusReporter
from vllm_dropin.settings.settings import HookSettings, Settings
from vllm_dropin.supervisor.download import DownloadRequest, Progress, download
from vllm_dropin.supervisor.engine import EngineKeeper, EngineSite
from vllm_dropin.supervisor.hook import HookRequest, HookState, run_hook
from vllm_dropin.supervisor.phases import PhaseBoard
from vllm_dropin.supervisor.probe import Probe
from vllm_dropin.supervisor.references import bundled, flag_values, references
from vllm_dropin.supervisor.restarts import RestartBudget
from vllm_dropin.supervisor.runtime import RuntimeFolder

log = get("launch")
hook_log = get("custom.py")


class Launch:
    """Prepares the engine of one service. An engine restart uses the same command: nothing here runs again."""

    def __init__(self, settings: Settings, runtime: RuntimeFolder, board: PhaseBoard, reporter: StatusReporter) -> None:
        self._settings = settings
        self._runtime = runtime
        self._board = board
        self._reporter = reporter

    async def prepare(self) -> EngineSite:
        """Do everything that comes before the engine. Raises what each step raises; all of it ends the start."""
        settings = self._settings
        stages = 3 if settings.hook and settings.hook.has_load_model else 1
        changes: Mapping[str, str | None] = {}
        if settings.hook is not None:
            self._reporter.stage(1, stages, "Running custom.py")
            changes = await self._run_hook(settings.hook)
            REDACTOR.learn(value for name, value in changes.items() if value and is_secret_name(name))
            if stages == 3:
                self._reporter.stage(2, stages, "custom.py has finished")
        settings = settings.after_hook(changes)
        if settings.engine is not None and settings.engine.model.hub_id is not None:
            settings = await self._download(settings, settings.engine, settings.engine.model.hub_id)
        plan = settings.engine
        assert plan is not None  # an upstream is not launched
        if (weights := plan.weights) is not None:
            if await self._verify(weights):
                plan = bundled(plan, settings.folder.path)
            report = await asyncio.to_thread(check_weights, weights)
            for warning in report.warnings:
                log.warning("%s", warning)
        self._reporter.stage(stages, stages, "Launching the engine")
        socket = None if plan.tcp else self._runtime.engine_socket
        target: Path | str = f"http://{plan.tcp[0]}:{plan.tcp[1]}" if plan.tcp else self._runtime.engine_socket
        command = build(plan, self._runtime.engine_socket)
        return EngineSite(command, settings.folder.path, Probe(target), socket)

    async def _run_hook(self, hook: HookSettings) -> Mapping[str, str | None]:
        self._board.enter(Phase.HOOK, "custom.py is running")
        return await run_custom(self._settings, hook, self._runtime)

    async def _download(self, settings: Settings, plan: EnginePlan, model: str) -> Settings:
        """Fetch the hub model; the engine starts offline only when everything that its flags name is complete."""
        self._board.enter(Phase.DOWNLOADING, model)
        flags = flag_values(plan)
        folder = flags.get("download_dir")
        request = DownloadRequest(
            python=plan.python.path,
            references=references(model, flags, settings.folder.path),
            environ=settings.environments.download,
            cwd=settings.folder.path,
            download_dir=Path(folder[-1]) if folder else None,
        )
        result = await download(request, self._show)
        for reason in result.missing:
            log.warning("the engine stays online: %s", reason)
        return settings.after_download(result.folder, result.complete)

    def _show(self, progress: Progress) -> None:
        self._board.enter(Phase.DOWNLOADING, str(progress), progress.fraction)

    async def _verify(self, weights: Path) -> Verification | None:
        """Compare the weights with the manifest of a bundle, where there is one: hundreds of gigabytes take minutes."""
        loop = asyncio.get_running_loop()
        stopping = threading.Event()

        def tell(done: int, total: int) -> None:
            if stopping.is_set():
                raise InterruptedError
            fraction = done / total if total else None
            loop.call_soon_threadsafe(self._board.enter, Phase.LOADING, "verifying weights", fraction)

        cache = hashes.cache_file(self._settings.paths.state_dir, weights)
        try:
            found = await asyncio.to_thread(manifest.verify, weights, cache, tell)
        except asyncio.CancelledError:
            stopping.set()  # the thread would go on to the last byte, and the process would wait for it
            raise
        if found is not None:
            log.info("the weights are what their manifest says: %s", found)
        return found


async def run_custom(settings: Settings, hook: HookSettings, runtime: RuntimeFolder) -> Mapping[str, str | None]:
    """Run custom.py as `serve` does, and remember in the state folder whether it finished.

    Gives its changes of the environment. Raises HookError, and InputOutputError for the state folder.
    """
    assert settings.engine is not None  # an upstream needs no hook
    state = HookState(settings.paths.state_dir / "hooks" / folder_key(settings.folder.path))
    if state.unfinished:
        log.warning("the last run of custom.py did not finish; what it wrote may be incomplete, it runs again")
    state.started()
    request = HookRequest(
        python=settings.engine.python.path,
        hook_file=hook.file,
        code_dir=settings.folder.path,
        environ=settings.environments.hook,
        timeout=hook.timeout,
        runtime_dir=runtime.path,
        extra_paths=hook.extra_paths,
    )
    result = await run_hook(request, lambda line: hook_log.info("%s", line))
    state.finished()
    return result.environ_changes


def engine_keeper(
    settings: Settings, site: EngineSite, state: SharedState, board: PhaseBoard, reporter: StatusReporter
) -> EngineKeeper:
    """What keeps the prepared engine running, as the settings have it."""
    supervision = settings.supervision
    return EngineKeeper(
        site,
        RestartBudget(supervision.max_restarts, supervision.max_backoff),
        state,
        board,
        on_restart=lambda reason: reporter.send("Engine restarted", REDACTOR.hide(reason)),
        start_timeout=supervision.start_timeout,
        hang_timeout=supervision.hang_timeout,
    )


def folder_key(folder: Path) -> str:
    """A name for what the state folder keeps about one model folder: several may share a state folder."""
    return hashlib.sha256(str(folder).encode()).hexdigest()[:16]
