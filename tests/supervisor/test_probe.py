"""The engine asked from outside: every question has an end, whatever the other side does."""

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_dropin.supervisor.probe import Probe, ServedModels


@contextmanager
def server(path: Path, head: bytes, trickle: bytes = b"") -> Iterator[None]:
    """Answers each connection with `head`, then with `trickle` every 50 ms for as long as somebody listens."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def talk(client: socket.socket) -> None:
        with client:
            try:
                client.recv(4096)
                client.sendall(head)
                while trickle:
                    client.sendall(trickle)
                    time.sleep(0.05)
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(client,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def test_health_models_and_counters(tmp_path):
    probe = Probe(tmp_path / "socket")
    assert asyncio.run(probe.health()) is None
    with server(tmp_path / "socket", answer(b'{"data": [{"id": "one", "max_model_len": 9}, {"id": "two"}, 3]}')):
        assert asyncio.run(probe.health()) == 200
        assert asyncio.run(probe.models()) == ServedModels(("one", "two"), 9)


def test_counters_are_summed_and_nonsense_is_left_out(tmp_path):
    text = (
        b'vllm:prompt_tokens_total{e="0"} 5.0\nvllm:prompt_tokens_total{e="1"} 2\nvllm:prompt_tokens_total x\nother 1\n'
    )
    with server(tmp_path / "socket", answer(text)):
        assert asyncio.run(Probe(tmp_path / "socket").counters()) == {"vllm:prompt_tokens_total": 7.0}


def test_a_trickle_does_not_hold_a_question(tmp_path):
    """A byte now and then is within the time limit of the socket, but not within that of the question."""
    with server(tmp_path / "socket", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", trickle=b"#"):
        begin = time.monotonic()
        assert asyncio.run(Probe(tmp_path / "socket").counters(timeout=0.3)) is None
        assert time.monotonic() - begin < 1
    threads = [thread for thread in threading.enumerate() if thread.name == "probe"]
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_a_question_that_nobody_waits_for_does_not_hold_the_process(tmp_path):
    """A server that accepts and says nothing: a cancelled question must not keep the program from its end."""
    listener = socket.create_server(("127.0.0.1", 0))
    code = (
        "import asyncio, sys\n"
        "from vllm_dropin.supervisor.probe import Probe\n"
        "async def main():\n"
        "    task = asyncio.create_task(Probe(sys.argv[1], timeout=30).health())\n"
        "    await asyncio.sleep(0.3)\n"
        "    task.cancel()\n"
        "asyncio.run(main())\n"
    )
    with listener:
        begin = time.monotonic()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        subprocess.run([sys.executable, "-c", code, url], check=True, timeout=20)
    assert time.monotonic() - begin < 5
