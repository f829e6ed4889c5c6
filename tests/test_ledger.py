"""Every second of a run is booked once, whatever kills it and whatever the clocks do."""

import json
import os
import pathlib
import resource
import time

import pytest

from batiste.train import ledger as module
from batiste.train.account import Account, read_account
from batiste.train.ledger import FLUSH_SECONDS, LEDGER_FILE, Ledger, last_saved, note, read_ledger


class Clocks:
    """Stands in for the module `time`: a monotonic clock, and one on the wall that may be set."""

    def __init__(self):
        self.passed, self.wall = 5000.0, 1.7e9

    def monotonic(self) -> float:
        return self.passed

    def time(self) -> float:
        return self.wall

    def sleep(self, seconds: float) -> None:
        self.passed += seconds
        self.wall += seconds


@pytest.fixture
def clocks(monkeypatch) -> Clocks:
    """Clocks that only the test moves; the beat is called by hand."""
    clocks = Clocks()
    monkeypatch.setattr(module, "time", clocks)
    monkeypatch.setattr(Ledger, "_beat", lambda self: None)
    monkeypatch.setattr(module, "boot_id", lambda: "boot")
    return clocks


def open_ledger(workdir: pathlib.Path, clocks: Clocks, step: int = 0, reached: int = 0) -> Ledger:
    """A start: 2 s to begin, 3 s to restore, 4 s to compile."""
    ledger = Ledger(workdir)
    clocks.sleep(2)
    ledger.begin(config="abc")
    ledger.write("from", step=step, reached=reached)
    ledger.enter("restore")
    clocks.sleep(3)
    ledger.enter("compilation")
    clocks.sleep(4)
    ledger.enter("step")
    return ledger


def steps(ledger: Ledger, clocks: Clocks, first: int, last: int) -> None:
    """Steps of 0.25 s for data and 1 s of work."""
    for step in range(first, last + 1):
        ledger.enter("data wait")
        clocks.sleep(0.25)
        ledger.enter("step")
        clocks.sleep(1)
        ledger.reached(step)


def evaluation(ledger: Ledger, clocks: Clocks) -> None:
    """Two seconds, one of them of the compiler."""
    ledger.enter("evaluation")
    clocks.sleep(2)
    ledger.book("compilation", 1.0)
    ledger.enter("step")


def check_sum(account: Account, seconds: float) -> None:
    """All time is booked, and once."""
    assert sum(account.seconds.values()) == pytest.approx(seconds)
    assert account.clock_seconds == pytest.approx(seconds)
    assert sum(end - begin for begin, end, _ in account.intervals) == pytest.approx(seconds)


def test_phases_of_one_start_sum_to_its_time(tmp_path, clocks):
    ledger = open_ledger(tmp_path, clocks)
    steps(ledger, clocks, 1, 8)
    evaluation(ledger, clocks)
    clocks.wall -= 3600  # Set back in the middle: nothing depends on it.
    ledger.enter("idle")
    ledger.close("done")
    account = read_account(tmp_path)
    check_sum(account, 2 + 3 + 4 + 8 * 1.25 + 2)
    booked = {name: seconds for name, seconds in account.seconds.items() if seconds}
    assert booked == pytest.approx({
        "initialization": 2, "restore": 3, "compilation": 5, "data wait": 2, "step": 8,
        "evaluation": 1})
    assert account.goodput == pytest.approx(8 / 21)
    assert (account.starts[0].first, account.starts[0].reached) == (0, 8)
    assert account.starts[0].ended == "done" and account.starts[0].facts == {"config": "abc"}
    # One line for many steps.
    assert len(read_ledger(tmp_path)) <= 12


def kill(workdir: pathlib.Path, clocks: Clocks) -> None:
    """Leaves the time of the file's last change as the beat would have."""
    os.utime(workdir / LEDGER_FILE, (clocks.wall, clocks.wall))


@pytest.mark.parametrize("back", [0, 3600])
@pytest.mark.parametrize("boot", ["boot", "another"])
def test_a_kill_loses_little_and_all_of_it_is_accounted_for(
    tmp_path, clocks, monkeypatch, back, boot
):
    """Killed 6 s after the last line, down for 60 s, and the wall clock set back meanwhile."""
    ledger = open_ledger(tmp_path, clocks)  # 9 s
    steps(ledger, clocks, 1, 10)  # 12.5 s
    ledger.enter("save blocked")
    clocks.sleep(0.5)
    ledger.enter("step")
    steps(ledger, clocks, 11, 20)  # 12.5 s
    ledger._pulse()  # As more than ten seconds have passed since the last line.
    steps(ledger, clocks, 21, 24)  # 5 s, of which the ledger does not know
    clocks.sleep(1)
    kill(tmp_path, clocks)
    clocks.sleep(60)
    clocks.wall -= back
    monkeypatch.setattr(module, "boot_id", lambda: boot)
    ledger = open_ledger(tmp_path, clocks, 10, 24)  # 9 s
    steps(ledger, clocks, 11, 30)  # 25 s
    ledger.close("done")

    # On another boot there is only the wall clock, and nobody can tell how long it was down.
    down = 0 if back and boot == "another" else 60
    account = read_account(tmp_path)
    assert sum(account.seconds.values()) == pytest.approx(9 + 25.5 + 6 + down + 34)
    if down:
        assert account.clock_seconds == pytest.approx(sum(account.seconds.values()))
    assert account.seconds["lost"] == pytest.approx(6)
    assert account.seconds["down"] == pytest.approx(down)
    # Of the 40 steps that were done and written down, ten were done again.
    assert account.seconds["step"] == pytest.approx(40)
    assert account.productive_seconds == pytest.approx(30)
    assert (account.steps_lost, account.steps_recomputed) == (14, 14)
    assert account.recoveries == pytest.approx([down + 9 + 1.25])
    assert [start.ended for start in account.starts] == ["killed", "done"]
    assert [(start.first, start.reached) for start in account.starts] == [(0, 24), (10, 30)]


def test_two_kills_one_of_them_before_anything_was_computed(tmp_path, clocks):
    ledger = open_ledger(tmp_path, clocks)
    steps(ledger, clocks, 1, 12)
    ledger.enter("save blocked")
    ledger.enter("step")
    clocks.sleep(FLUSH_SECONDS)  # In the middle of a long step.
    ledger._pulse()
    kill(tmp_path, clocks)
    clocks.sleep(20)
    open_ledger(tmp_path, clocks, 10, 12)
    kill(tmp_path, clocks)
    note(tmp_path, "exit", pid=os.getpid(), code=-9, what="killed by SIGKILL", step=10)
    note(tmp_path, "exit", pid=1, code=-9, what="another host's process", step=10)
    clocks.sleep(30)
    note(tmp_path, "supervise", says="starting again")
    ledger = open_ledger(tmp_path, clocks, 10, 10)
    steps(ledger, clocks, 11, 11)
    ledger.close("SIGTERM")
    clocks.sleep(5)
    ledger = open_ledger(tmp_path, clocks, 11, 11)
    steps(ledger, clocks, 12, 13)
    ledger.close("done")
    account = read_account(tmp_path)
    check_sum(account, 9 + 15 + 10 + 20 + 9 + 30 + 9 + 1.25 + 5 + 9 + 2.5)
    assert account.seconds["down"] == pytest.approx(55)
    # From the first death to step 11, and from the preemption to step 12.
    assert account.recoveries == pytest.approx([20 + 9 + 30 + 9 + 1.25, 5 + 9 + 1.25])
    assert [start.ended for start in account.starts] == [
        "killed", "killed by SIGKILL", "SIGTERM", "done"]
    # Step 12 has been computed again only in the last start, 11 in the one before.
    assert (account.steps_lost, account.steps_recomputed) == (2, 2)
    assert account.productive_seconds == pytest.approx(13)


def test_a_run_that_goes_back_while_it_runs_has_lost_those_steps(tmp_path, clocks):
    ledger = open_ledger(tmp_path, clocks)
    steps(ledger, clocks, 1, 9)
    ledger.enter("restore")
    ledger.write("decision", action="roll_back", to=4)
    ledger.write("from", step=4, reached=9)
    ledger.enter("step")
    steps(ledger, clocks, 5, 12)
    ledger.close("done")
    account = read_account(tmp_path)
    assert (account.steps_lost, account.steps_recomputed) == (5, 5)
    assert account.seconds["step"] == pytest.approx(17)
    assert account.productive_seconds == pytest.approx(12)
    assert [event["action"] for event in account.happened] == ["roll_back"]
    assert account.recoveries == []


def test_time_between_a_finished_run_and_its_extension_is_idle(tmp_path, clocks):
    ledger = open_ledger(tmp_path, clocks)
    ledger.close("done")
    clocks.sleep(1000)
    open_ledger(tmp_path, clocks).close("done")
    account = read_account(tmp_path)
    assert account.seconds["idle"] == pytest.approx(1000) and account.seconds["down"] == 0
    check_sum(account, 1018)


def test_torn_lines_are_left_out_and_the_next_line_stands_alone(tmp_path, clocks):
    ledger = open_ledger(tmp_path, clocks)
    path = tmp_path / LEDGER_FILE
    whole = path.read_bytes()
    for cut in (1, 30):
        path.write_bytes(whole[:-cut])
        note(tmp_path, "told", number=cut)
        assert [event["event"] for event in read_ledger(tmp_path)][-2:] != ["told", "told"]
        assert read_ledger(tmp_path)[-1]["number"] == cut
    path.write_bytes(b"\x00garbage\n[1]\n" + whole)
    ledger.close("done")
    assert read_account(tmp_path).starts[0].ended == "done"


def test_a_full_disk_ends_no_run_and_its_lines_come_later(tmp_path, clocks, capsys):
    """A limit on the size of a file stands for the disk, which takes a part of the next line."""
    ledger = open_ledger(tmp_path, clocks)
    path, limit = tmp_path / LEDGER_FILE, resource.getrlimit(resource.RLIMIT_FSIZE)
    before = path.read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limit[1]))
        steps(ledger, clocks, 1, 20)
        ledger.enter("evaluation")
        ledger.enter("step")
        (said,) = capsys.readouterr().err.splitlines()
        assert "File too large" in said and path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    ledger.close("done")
    assert read_account(tmp_path).seconds["step"] == pytest.approx(20)


def test_a_refused_run_leaves_nothing_and_one_that_fails_says_why(tmp_path, clocks):
    with pytest.raises(ValueError), Ledger(tmp_path / "refused") as ledger:
        ledger.enter("data preparation")
        raise ValueError("no such file")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ValueError, match="no ledger.jsonl"):
        read_account(tmp_path)
    with pytest.raises(ValueError), open_ledger(tmp_path, clocks):
        raise ValueError("the loss is\nnan")
    assert read_ledger(tmp_path)[-1] | {"time": 0, "clock": 0} == {
        "time": 0, "clock": 0, "event": "end", "reason": "error",
        "error": "ValueError: the loss is nan"}
    assert read_account(tmp_path).starts[0].ended == "error"


def test_a_long_preparation_is_written_down_although_nothing_has_begun(tmp_path, clocks):
    ledger = Ledger(tmp_path, started=clocks.monotonic() - 100)
    ledger.enter("data preparation")
    clocks.sleep(FLUSH_SECONDS - 1)
    ledger._pulse()
    assert not (tmp_path / LEDGER_FILE).exists()
    clocks.sleep(1)
    ledger._pulse()
    seconds = read_account(tmp_path).seconds
    assert (seconds["initialization"], seconds["data preparation"]) == (100, FLUSH_SECONDS)


def test_the_beat_tells_the_next_start_until_when_this_one_lived(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.begin()
        os.utime(tmp_path / LEDGER_FILE, (0, 0))
        ledger._pulse()
        assert time.time() - (tmp_path / LEDGER_FILE).stat().st_mtime < 60
    assert json.loads((tmp_path / LEDGER_FILE).read_text().splitlines()[0])["alive"] is None
    with Ledger(tmp_path) as ledger:
        ledger.begin()
    alive = [event["alive"] for event in read_ledger(tmp_path) if event["event"] == "start"]
    assert time.time() - alive[1] < 60


def test_a_run_that_runs_is_said_to_run(tmp_path, clocks, monkeypatch):
    ledger = open_ledger(tmp_path, clocks)
    steps(ledger, clocks, 1, 3)
    ledger._pulse()
    monkeypatch.setattr("batiste.train.account.time", clocks)
    kill(tmp_path, clocks)
    account = read_account(tmp_path)
    assert account.starts[0].ended == "running" and account.seconds["lost"] == 0
    clocks.sleep(30)
    assert read_account(tmp_path).starts[0].ended == "killed"


def test_processes_other_than_the_first_write_nothing():
    with Ledger(None) as ledger:
        ledger.begin()
        ledger.enter("step")
        ledger.reached(1)
        ledger.book("compilation", 1.0)
        ledger.close("done")


def test_the_newest_saved_step_is_none_that_the_run_has_gone_back_behind(tmp_path):
    assert last_saved(tmp_path) is None
    with Ledger(tmp_path) as ledger:
        ledger.begin()
        for step in (5, 10):
            ledger.write("saved", step=step)
        assert last_saved(tmp_path) == 10
        for to, expected in ((5, 5), (0, None)):
            ledger.write("decision", action="roll_back", to=to)
            assert last_saved(tmp_path) == expected
