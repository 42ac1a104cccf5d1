import shutil

from vllm_dropin.gateway.state import Phase, SharedState
from vllm_dropin.supervisor.phases import PhaseBoard


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    """The file system of the runtime folder is full, or somebody has emptied it."""
    folder = tmp_path / "runtime"
    folder.mkdir()
    state = SharedState.create(folder / "state", 1)
    board = PhaseBoard(state, "0.32.0")
    shutil.rmtree(folder)
    board.enter(Phase.READY)
    assert state.phase is Phase.READY
    assert "/status can't be brought up to date" in caplog.text
