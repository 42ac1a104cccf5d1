import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dropin.errors import AddressError, ConfigurationError
from vllm_dropin.supervisor.runtime import SOCKET_PATH_LIMIT, RuntimeFolder, listen, sweep


def test_the_folder_is_private_and_goes_away(tmp_path):
    folder = RuntimeFolder.create(tmp_path / "run")
    assert folder.path.parent == tmp_path / "run"
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    folder.remove()
    assert not folder.path.exists()


def test_a_path_too_long_for_a_socket_is_replaced_by_a_short_one(tmp_path):
    folder = RuntimeFolder.create(tmp_path / ("x" * 120))
    try:
        assert len(os.fsencode(folder.engine_socket)) <= SOCKET_PATH_LIMIT
    finally:
        folder.remove()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="runtime folder"):
        RuntimeFolder.create(tmp_path / "file")


def test_a_taken_port_is_an_error_with_a_remedy():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(AddressError, match=f"127.0.0.1:{port} is taken") as caught:
            listen("127.0.0.1", port)
    assert caught.value.exit_code == 78
    assert "--address" in caught.value.remedy


def test_an_address_that_is_not_ours():
    with pytest.raises(AddressError, match=r"cannot listen on 192\.0\.2\.1"):
        listen("192.0.2.1", 0)


def test_the_socket_listens_alone():
    with listen("127.0.0.1", 0) as public:
        assert public.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0
        with socket.create_connection(public.getsockname(), timeout=5):
            pass


def test_a_cleaner_of_old_files_sees_that_the_folder_is_in_use(tmp_path):
    folder = RuntimeFolder.create(tmp_path)
    descriptor = os.open(folder.path, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.remove()
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def left_behind(base: Path) -> Path:
    """The runtime folder of a process that was killed, with a key in it."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom vllm_dropin.supervisor.runtime import RuntimeFolder\n"
        "folder = RuntimeFolder.create(Path(sys.argv[1])).path\n(folder / 'tls-1.pem').write_text('key')\n"
        "(folder / 'sub').mkdir()\nprint(folder, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(base)], capture_output=True, text=True, timeout=20)
    assert done.returncode == -signal.SIGKILL
    return Path(done.stdout.strip())


def test_what_a_killed_process_has_left_is_swept(tmp_path):
    living = RuntimeFolder.create(tmp_path)
    left = left_behind(tmp_path)
    assert (left / "tls-1.pem").exists()
    new = RuntimeFolder.create(tmp_path)
    assert not left.exists()
    assert living.path.is_dir()
    new.remove()
    living.remove()
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_is_swept(tmp_path):
    base, precious = tmp_path / "base", tmp_path / "precious"
    precious.mkdir(mode=0o700)
    (precious / "file").touch()
    left = left_behind(base)
    (left / "way-out").symlink_to(precious)
    (base / "vllm-dropin-linked00").symlink_to(precious)
    (base / "vllm-dropin-aFile000").touch()
    (base / "vllm-dropin-verify-abcdefgh").mkdir(mode=0o700)
    (base / "vllm-dropin-10006500").mkdir(mode=0o700)  # where state goes when there is no better place
    (base / "vllm-dropin-forAll00").mkdir()
    (base / "vllm-dropin-forAll00").chmod(0o755)
    before = set(base.iterdir())
    sweep(base)
    assert set(base.iterdir()) == before - {left}
    assert (precious / "file").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder away takes root")
def test_a_folder_of_another_user_is_not_swept(tmp_path):
    left = left_behind(tmp_path)
    os.chown(left, 65534, 65534)
    sweep(tmp_path)
    assert left.exists()


def test_folders_made_while_others_sweep_are_there(tmp_path):
    code = "import sys\nfrom pathlib import Path\nfrom vllm_dropin.supervisor.runtime import RuntimeFolder\n"
    code += "for _ in range(300):\n    folder = RuntimeFolder.create(Path(sys.argv[1]))\n"
    code += "    folder.state.touch()\n    folder.remove()\n"
    crowd = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(30) for process in crowd] == [0] * 4
    assert list(tmp_path.iterdir()) == []
