"""One process at a time writes to a work directory, and is named to whoever else wants to."""

import contextlib
import errno
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from batiste import command_line, main
from batiste.configs.experiment import Experiment
from batiste.train import lock
from batiste.train.lock import LOCK_FILE, holder_of, work_directory_lock

HOLD = """
import sys, time
from batiste.train.lock import work_directory_lock
with work_directory_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """A work directory, and another process that holds it."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield tmp_path, process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_in_one_line_and_a_dead_one_holds_nothing(other):
    workdir, process = other
    command = (f"--workdir={workdir}", "--config=configs/quickstart.py")
    refusals = [["train", *command], ["prepare", *command], ["train", *command, "--break_lock"],
                ["import", "--from=nowhere", f"--workdir={workdir}"]]
    for arguments in refusals:
        with pytest.raises(SystemExit) as ended:
            command_line.run(["batiste", *arguments])
        line = str(ended.value.code)
        assert line.startswith(f"error: workdir={workdir}: is in use by process {process.pid} on ")
        assert str(holder_of(workdir)["started"]) in line and "\n" not in line
    assert [path.name for path in workdir.iterdir()] == [LOCK_FILE], "nothing else was touched"
    process.kill()
    process.wait()
    assert holder_of(workdir)["pid"] == process.pid
    with work_directory_lock(workdir):
        assert holder_of(workdir)["pid"] == os.getpid()


def test_in_sequence_yes_in_two_threads_no_and_nothing_is_left(tmp_path):
    workdir, refused = tmp_path / "run", []

    def second():
        try:
            with work_directory_lock(workdir):
                pass
        except ValueError as error:
            refused.append(str(error))

    for _ in range(2):
        with work_directory_lock(workdir):
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
    assert len(refused) == 2 and f"is in use by process {os.getpid()}" in refused[0]
    assert not workdir.exists(), "what was made for nothing is gone"
    with contextlib.suppress(KeyError), work_directory_lock(workdir):
        (workdir / "x").touch()
        raise KeyError
    assert [path.name for path in workdir.iterdir()] == ["x"]


def test_a_refused_run_makes_no_directory(tmp_path):
    experiment = Experiment()
    experiment.data.sources[0].path = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match="resume=must"):
        main.train(experiment, tmp_path / "run", resume="must", force=True)
    assert not (tmp_path / "run").exists()


def elsewhere(workdir: pathlib.Path) -> pathlib.Path:
    """A lock file that a process on another machine has left."""
    path = workdir / LOCK_FILE
    path.write_text(json.dumps({"pid": 7, "host": "elsewhere", "boot": "x", "started": "noon"}))
    return path


@pytest.fixture
def beating():
    """Renews a file, as a process on another machine does, until the test is over."""
    ended, threads = threading.Event(), []

    def start(path: pathlib.Path):
        def renew():
            while not ended.wait(0.02):
                with contextlib.suppress(OSError):
                    os.utime(path)

        threads.append(threading.Thread(target=renew))
        threads[0].start()

    yield start
    ended.set()
    threads[0].join()


def test_where_locks_do_not_reach_a_machine_that_gives_signs_of_life_holds(
        tmp_path, beating, monkeypatch):
    monkeypatch.setattr(lock, "SILENT_SECONDS", 2.0)
    beating(elsewhere(tmp_path))
    for break_lock in (False, True):
        with pytest.raises(ValueError, match="in use by process 7 on elsewhere since noon"):
            with work_directory_lock(tmp_path, break_lock):
                pass


def test_where_locks_do_not_reach_a_silent_machine_holds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENT_SECONDS", 0.2)
    elsewhere(tmp_path)
    with work_directory_lock(tmp_path):
        assert holder_of(tmp_path)["pid"] == os.getpid()


def test_a_lock_that_a_dead_machine_has_left_on_a_network_disk_is_broken_by_the_flag(
        other, monkeypatch):
    """The lock of another process here stands for the one that a server keeps for a dead client."""
    monkeypatch.setattr(lock, "SILENT_SECONDS", 0.2)
    workdir, _ = other
    elsewhere(workdir)
    with pytest.raises(ValueError, match="process 7 on elsewhere.*if that machine is gone, --break"):
        with work_directory_lock(workdir):
            pass
    with work_directory_lock(workdir, break_lock=True):
        assert holder_of(workdir)["pid"] == os.getpid()
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
            with work_directory_lock(workdir):
                pass


def test_where_there_are_no_locks_the_text_of_the_file_is_one(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with work_directory_lock(tmp_path):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
            with work_directory_lock(tmp_path):
                pass
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / LOCK_FILE).write_text(json.dumps({
        "pid": gone.pid, "host": lock.socket.gethostname(), "boot": lock.boot_id(),
        "started": "noon"}))
    with work_directory_lock(tmp_path):
        pass


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    with work_directory_lock(tmp_path):
        first = (tmp_path / LOCK_FILE).stat().st_mtime_ns
        while (tmp_path / LOCK_FILE).stat().st_mtime_ns == first:
            time.sleep(0.01)
