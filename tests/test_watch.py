"""The processes of a run learn at once which of them is gone; three of them, without jax."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# The file alone: importing the room takes jax and seconds. A file stands in for jax's store.
PROGRAM = """
import importlib.util, os, pathlib, sys, time
spec = importlib.util.spec_from_file_location("watch", sys.argv[1])
watch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(watch)
watch.LEFT_SECONDS = 0.5
folder, index = pathlib.Path(sys.argv[2]), int(sys.argv[3])

class Store:
    def key_value_set(self, key, value):
        (folder / "new").write_text(value)
        (folder / "new").rename(folder / "port")

    def blocking_key_value_get(self, key, milliseconds):
        while not (folder / "port").exists():
            time.sleep(0.01)
        return (folder / "port").read_text()

def lost(line):
    print(line, flush=True)
    os._exit(200)

watching = watch.Watch(Store(), "127.0.0.1", index, 3, lost)
(folder / f"up{index}").touch()
while not (folder / f"leave{index}").exists():
    time.sleep(0.01)
# At the end of the process it takes leave again, which nobody must take for something else.
print("left" if watching.leave(10) else "left alone", flush=True)
"""


@pytest.fixture
def three(tmp_path):
    """Three processes that watch each other, ended at the latest with the test."""
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(ROOT / "sharding/watch.py"),
                          str(tmp_path), str(index)], stdout=subprocess.PIPE, text=True)
        for index in range(3)]
    while not all((tmp_path / f"up{index}").exists() for index in range(3)):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    yield processes
    for process in processes:
        process.kill()


def outcome(process: subprocess.Popen) -> tuple[int, str]:
    """Its code and what it printed."""
    printed = process.communicate(timeout=30)[0]
    return process.returncode, printed.strip()


@pytest.mark.parametrize("victim", range(3))
def test_a_process_that_is_killed_is_named_by_all_others(three, victim):
    three[victim].send_signal(signal.SIGKILL)
    for index, process in enumerate(three):
        if index != victim:
            assert outcome(process) == (200, f"process {victim} of 3 is lost")


@pytest.mark.parametrize("first", range(3))
def test_where_one_ends_in_order_the_others_may_not_stay(three, first, tmp_path):
    (tmp_path / f"leave{first}").touch()
    assert outcome(three[first]) == (0, "left alone")
    outcomes = [outcome(three[index]) for index in range(3) if index != first]
    # Whoever knows first says so, and its own end ends the other.
    assert all(code == 200 for code, _ in outcomes)
    assert any(line == f"process {first} of 3 has ended, and this one has not"
               for _, line in outcomes), outcomes


def test_when_all_end_nobody_is_missed(three, tmp_path):
    for index in (1, 0, 2):
        (tmp_path / f"leave{index}").touch()
    assert [outcome(process) for process in three] == 3 * [(0, "left")]
