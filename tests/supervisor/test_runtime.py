import fcntl
import os
import socket
import stat

import pytest

from vllm_dropin.errors import AddressError, ConfigurationError
from vllm_dropin.supervisor.runtime import SOCKET_PATH_LIMIT, RuntimeFolder, listen


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
