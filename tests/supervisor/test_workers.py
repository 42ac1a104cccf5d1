"""The gateway's processes as their keeper sees them; what clients see is in test_service.py."""

import asyncio
import os
import signal
import socket
from pathlib import Path

from vllm_dropin.gateway.state import SharedState
from vllm_dropin.supervisor import workers
from vllm_dropin.supervisor.runtime import RuntimeFolder
from vllm_dropin.supervisor.workers import GatewayWorkers


def test_no_worker_is_started_once_they_are_stopped(tmp_path):
    """One dies just before the stop, so that its replacement would come just after it."""

    async def scenario(public: socket.socket, runtime: RuntimeFolder) -> set[int]:
        state = SharedState.create(runtime.state, 2)
        runtime.gateway_config.write_text("{}")  # they end by themselves at once, but are started again
        gateway = GatewayWorkers(public, runtime, state, dict(os.environ))
        await gateway.start()
        keeping = asyncio.create_task(gateway.run())
        os.kill(gateway.pids[0], signal.SIGKILL)
        await asyncio.sleep(workers.RESTART_AFTER / 2)
        stopped = set(gateway.pids)
        await gateway.stop()
        await asyncio.sleep(workers.RESTART_AFTER * 2)
        started = set(gateway.pids) - stopped
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        return {pid for pid in {*started, *stopped} if Path(f"/proc/{pid}").exists()} | started

    runtime = RuntimeFolder.create(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as public:
        assert asyncio.run(scenario(public, runtime)) == set()
    runtime.remove()
