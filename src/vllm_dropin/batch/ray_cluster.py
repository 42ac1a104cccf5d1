"""The Ray cluster of one run: joined, or started on this machine and ended again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import signal
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

from vllm_dropin import __version__
from vllm_dropin.batch.ray_errors import in_short
from vllm_dropin.errors import ConfigurationError

_INSTALL = "Install it on every node: pip install 'vllm-dropin[ray]'."
_OWN_STORE = 512 << 20
"""Bytes of shared memory for a cluster of ours: only blocks on their way to the engines are in it."""
_REACH, _CHECK = 5.0, 60.0
_LOOPBACK = "127.0.0.1"
_KILL_CHILDREN = "RAY_kill_child_processes_on_worker_exit"
"""Off for replicas: Ray kills the children of a process that ends, and not theirs. That would be the guardian alone,
which would have ended the whole engine."""


def require_ray() -> None:
    """Raises ConfigurationError unless Ray Data can be used."""
    # Whoever scores prompts has not asked for anything to be told to anybody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(f"--ray needs Ray Data, which is not there ({error})", _INSTALL) from None


@contextlib.asynccontextmanager
async def cluster(address: str) -> AsyncIterator[bool]:
    """Be the driver of the cluster at `address`; "": of what RAY_ADDRESS or this machine has, else of a new one.

    Gives whether it is a new one, which is on this machine's loopback address, and ends with the block. One that was
    joined is left as it was found. Raises ConfigurationError when there is none, or none that goes with this driver.
    """
    _silence()
    # In a thread: in the main one Ray would replace our signal handlers. The thread has to outlive the cluster, which
    # dies with the thread that started it; asyncio's own ones live as long as the loop.
    started = await asyncio.to_thread(_connect, address)
    # Ray's C++ part has put a handler before Python's, which prints a stack at each SIGTERM.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    try:
        yield started
    finally:
        import ray

        await asyncio.to_thread(ray.shutdown)


def _silence() -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    import ray.data  # noqa: F401 (it makes the loggers)
    from ray._private import worker

    # Ray prints what it thinks of a lost node on standard output, where only the summary belongs.
    worker._worker_logs_enabled = False

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("ray.")]:
        logging.getLogger(name).setLevel(logging.ERROR)


def _connect(address: str) -> bool:
    import ray

    if address.startswith("ray://"):
        raise ConfigurationError(
            f"{address} is for Ray Client, by which no files can be read",
            "Give the command on a node of the cluster (ray attach, or ray job submit), with --ray=auto.",
        )
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address not in ("", "auto", "local"):
            _reach(address)
            ray.init(address=address, **quiet)
            return False
        if address != "local":
            with contextlib.suppress(ConnectionError) if not address else contextlib.nullcontext():
                ray.init(address="auto", **quiet)
                return False
        _keep_to_loopback()
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=_OWN_STORE,
            _node_ip_address=_LOOPBACK,
            **quiet,
        )
    except (ConnectionError, RuntimeError, ValueError, AssertionError, TimeoutError) as error:
        raise _refused(address, error) from None
    return True


def _keep_to_loopback() -> None:
    """Ray takes 127.0.0.1 for "an address of this machine that others reach", and whoever reaches it may run anything.

    Only where it knows no clusters of several machines does it mean what it says: so it is told that this is such a
    place, by the variable for its processes and by the constant that has been made of it here.
    """
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def _reach(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH).close()
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"no Ray cluster answers at {address}: {error}", "Give the address that `ray start --head` printed."
        ) from None


def _refused(address: str, error: Exception) -> ConfigurationError:
    where = f"the Ray cluster at {address}" if address not in ("", "auto", "local") else "the Ray cluster"
    if "ersion mismatch" in str(error):
        told = "; ".join(line.strip() for line in str(error).splitlines() if ":" in line)
        return ConfigurationError(
            f"{where} has other versions than this driver: {told}",
            "Ray and Python have to be the same on all nodes, the driver's among them.",
        )
    return ConfigurationError(
        f"{where} can't be used: {in_short(error)}", "Look whether it runs: ray status --address ADDRESS."
    )


def check_nodes(gpus: float) -> None:
    """Refuse nodes that could be given a replica and lack what it is made of. Blocking.

    Raises ConfigurationError, which names them.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(_versions())
    asked = {
        node["NodeManagerAddress"]: ask.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU", 0) >= gpus
    }
    ours = (".".join(platform.python_version_tuple()[:2]), __version__)
    problems = []
    for name, reference in asked.items():
        try:
            found = ray.get(reference, timeout=_CHECK)
        except ray.exceptions.RayError:
            continue  # a node that has just gone, or is too busy to say: a replica there will tell
        if found != ours:
            there = f"vllm-dropin {found[1]}" if found[1] else "no vllm-dropin"
            problems.append(f"{name} has Python {found[0]} and {there}")
    if problems:
        raise ConfigurationError(
            f"nodes of the Ray cluster differ from this driver (Python {ours[0]}, vllm-dropin {ours[1]}): "
            + "; ".join(problems[:5]),
            _INSTALL,
        )


def _versions() -> Callable[[], tuple[str, str | None]]:
    # Inside of a function, so that Ray sends its code: on a node without this package it could not be imported.
    def versions() -> tuple[str, str | None]:
        import platform
        from importlib import metadata

        python = ".".join(platform.python_version_tuple()[:2])
        try:
            return python, metadata.version("vllm-dropin")
        except metadata.PackageNotFoundError:
            return python, None

    return versions


def new_actor(kind: type, gpus: float, *arguments: Any) -> Any:
    """An actor anywhere in the cluster, on other nodes than its like where there is a choice. It is never restarted:
    what it was asked would wait for that, though others could answer.
    """
    import ray

    options = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
    environment = {"env_vars": {_KILL_CHILDREN: "0"}}
    return ray.remote(kind).options(**options, runtime_env=environment).remote(*arguments)
