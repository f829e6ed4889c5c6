"""A supervisor starts again what a start can mend, gives up on the rest, and says what it does.

And the report of a real run that was killed in the middle accounts for all of its time.
"""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from batiste import exit_codes
from batiste.supervise import Patience, flag_of
from batiste.train.account import read_account
from batiste.train.ledger import LEDGER_FILE, read_ledger
from batiste.train.metrics import read_metrics
from batiste.train.page import report

CONFIG = """
from batiste.configs.experiment import Experiment
from test_resume import tiny_experiment


def get_config(arg=None):
    return tiny_experiment(arg)
"""
SUPERVISOR = """
import pathlib, sys
from batiste.supervise import Patience, Supervisor
supervisor = Supervisor([sys.executable, "-c", sys.argv[2]], pathlib.Path(sys.argv[1]),
                        Patience(retries=2, wait=0.01, longest_wait=0.05, grace=float(sys.argv[3])))
sys.exit(supervisor.run(sys.argv[4]))
"""
# In place of a run: notes how it was started, and ends as it is told for its first, second ... time.
CHILD = """
import os, pathlib, signal, sys, time
workdir = pathlib.Path({workdir!r})
with open(workdir / "started", "a") as file:
    print(sys.argv[1], file=file)
turn = len((workdir / "started").read_text().split()) - 1
{code}
"""
COMMIT = """
from batiste.train.ledger import note
note(workdir, "saved", step=turn)
"""


def supervise(workdir: pathlib.Path, code: str, grace: float = 30, resume: str = "auto"):
    """A supervisor of CHILD in a process of its own."""
    workdir.mkdir(exist_ok=True)
    child = CHILD.format(workdir=str(workdir), code=code)
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(workdir), child, str(grace), resume],
        stderr=subprocess.PIPE, text=True)


def child_environment() -> dict[str, str]:
    """Of a process that finds this folder's modules, and what was compiled before."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent),
                                       os.environ.get("PYTHONPATH", "")]),
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(__file__).parents[1] / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Its code, and what it said."""
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


def starts(workdir: pathlib.Path) -> list[str]:
    """The last argument of each start."""
    path = workdir / "started"
    return path.read_text().split() if path.exists() else []


@pytest.mark.parametrize("code,again", [
    (0, False), (1, False), (2, False), (130, False), (7, False), (143, True), (200, True),
    (201, True), (-9, True), (137, True), (-6, True), (-11, True), (-2, False)])
def test_which_codes_another_start_can_mend(code, again):
    assert exit_codes.retryable(code) == again
    assert exit_codes.meaning(code)


def test_what_cannot_be_mended_is_started_once(tmp_path):
    code, said = ended(supervise(tmp_path, "sys.exit(1)"))
    assert code == 1 and starts(tmp_path) == ["--resume=auto"]
    assert said == ("supervise: failed, as it says above; starting it again would not help\n")
    assert not (tmp_path / LEDGER_FILE).exists(), "there was no run to write about"


def test_starts_without_progress_end_after_the_retries(tmp_path):
    code, said = ended(supervise(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"))
    assert code == 137 and starts(tmp_path) == 3 * ["--resume=auto"]
    assert said.count("killed by SIGKILL; step None is committed; starting again in") == 2
    assert "giving up after 3 starts without a committed step" in said.splitlines()[-1]
    pauses = [Patience(9, 1.0, 10.0, 0).pause(failures) for failures in range(1, 7)]
    assert pauses == [1, 2, 4, 8, 10, 10]


def test_progress_renews_the_patience_and_then_nothing_starts_from_scratch(tmp_path):
    """Commits a step each time, five starts; the first was told to find no checkpoint."""
    (tmp_path / LEDGER_FILE).write_text("")
    code, said = ended(supervise(
        tmp_path, COMMIT + "sys.exit(200 if turn < 4 else 0)", resume="never"))
    assert code == 0 and starts(tmp_path) == ["--resume=never", *4 * ["--resume=must"]]
    assert said.splitlines()[-1] == "supervise: done"
    assert re.findall(r"step (\d) is committed", said) == ["0", "1", "2", "3"]
    written = read_ledger(tmp_path)
    assert [event["step"] for event in written if event["event"] == "exit"] == [0, 1, 2, 3, 4]
    assert [event["says"] for event in written if event["event"] == "supervise"] == [
        line.removeprefix("supervise: ") for line in said.splitlines()]


def test_what_is_not_committed_is_no_progress(tmp_path):
    code, _ = ended(supervise(
        tmp_path, "(workdir / f'checkpoints/{turn}').mkdir(parents=True); sys.exit(201)"))
    assert code == 201 and starts(tmp_path) == 3 * ["--resume=auto"]


def test_sigterm_goes_on_to_the_run_and_nothing_is_started_again(tmp_path):
    process = supervise(tmp_path, "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
                        "(workdir / 'ready').touch(); time.sleep(60)")
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    assert code == 143 and starts(tmp_path) == ["--resume=auto"]
    assert said == "supervise: stopped by SIGTERM, saved\n"


def test_sigterm_becomes_sigkill_after_the_grace(tmp_path):
    process = supervise(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                        "(workdir / 'deaf').touch(); time.sleep(60)", grace=0.2)
    while not (tmp_path / "deaf").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    assert code == 137 and starts(tmp_path) == ["--resume=auto"]
    assert said.splitlines() == [
        "supervise: SIGTERM was 0.2 s ago; SIGKILL", "supervise: killed by SIGKILL"]


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_run_does_not_outlive_its_supervisor(tmp_path):
    process = supervise(tmp_path, "(workdir / 'pid').write_text(str(os.getpid())); time.sleep(60)")
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    pid = int((tmp_path / "pid").read_text())
    process.kill()
    process.wait()
    while pathlib.Path(f"/proc/{pid}/cmdline").exists() and (
            pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()):
        time.sleep(0.01)


@pytest.fixture(scope="module")
def supervised(tmp_path_factory) -> tuple[pathlib.Path, str, tuple[float, float]]:
    """A real run under `batiste supervise`, killed once; what it printed; from when to when."""
    folder = tmp_path_factory.mktemp("supervised")
    (folder / "corpus").mkdir()
    for index in range(40):
        text = "".join(f"{index * line} is {index} times {line}\n" for line in range(30))
        (folder / "corpus" / f"{index}.txt").write_text(text)
    (folder / "config.py").write_text(CONFIG)
    workdir = folder / "it's a \"run\""
    began = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "batiste", "supervise", "--wait=0.5", "--", "train",
         f"--config={folder}/config.py:{folder}/corpus/*.txt", "--workdir", str(workdir),
         "--config.train.num_steps=1500", "--config.train.checkpoint.every=20",
         "--config.train.evaluation.every=1000", "--resume=never"],
        env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not any(record["step"] > 50 for record in read_metrics(workdir)):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    (start,) = (event for event in read_ledger(workdir) if event["event"] == "start")
    os.kill(start["pid"], signal.SIGKILL)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    return workdir, printed, (began, time.time())


@pytest.mark.slow
def test_a_supervised_run_continues_after_a_kill(supervised):
    workdir, printed, _ = supervised
    step = int(re.search(r"supervise: killed by SIGKILL; step (\d+) is committed; starting again "
                         r"in 0\.5 s", printed)[1])
    assert step >= 20 and step % 20 == 0
    assert f"continuing from step {step} of" in printed
    assert printed.splitlines()[-1] == "supervise: done"


@pytest.mark.slow
def test_its_ledger_accounts_for_all_of_the_time_within_one_percent(supervised):
    workdir, _, (began, finished) = supervised
    account = read_account(workdir)
    events = read_ledger(workdir)
    first = next(event for event in events if event["event"] == "start")
    *_, last = (event for event in events if event["event"] == "exit")
    # The phases by a clock of the process, the same time by the clock on the wall.
    passed = last["time"] - first["time"]
    assert sum(account.seconds.values()) == pytest.approx(passed, rel=0.01)
    assert began <= first["time"] + 0.05 and last["time"] <= finished
    assert all(seconds >= 0 for seconds in account.seconds.values()), account.seconds
    for phase in ("initialization", "data preparation", "restore", "compilation", "data wait",
                  "step", "evaluation", "save blocked", "sampling"):
        assert account.seconds[phase] > 0, phase
    assert account.seconds["down"] > 0.45  # When a process began is known to 10 ms.
    assert account.seconds["lost"] < 12


@pytest.mark.slow
def test_it_says_what_the_kill_has_cost(supervised):
    workdir, _, _ = supervised
    account = read_account(workdir)
    killed, second = account.starts
    assert killed.ended == "killed by SIGKILL" and second.ended == "done"
    assert killed.reached > 50 and (second.first, second.reached) == (second.first, 1500)
    assert account.steps_lost == account.steps_recomputed == killed.reached - second.first
    (recovery,) = account.recoveries
    assert recovery == pytest.approx(second.recovered - killed.end)
    assert recovery > account.seconds["down"]
    # Of the steps that were lost, those after the last line were never booked as steps.
    assert 0 < account.productive_seconds <= account.seconds["step"]
    facts = second.facts
    assert facts["device"] == "cpu" and facts["code"].startswith("0.")
    assert re.fullmatch("[0-9a-f]{12}", facts["config"])


@pytest.mark.slow
def test_the_report_is_text_and_one_page_that_fetches_nothing(supervised):
    workdir, _, _ = supervised
    path = workdir / "metrics.jsonl"
    before = path.read_text()
    path.write_text(before + '{"step": 30, "ki')
    # A process that cannot have a device; the report must not ask for one, nor wait for jax.
    code = ("import sys; from batiste.command_line import run\ntry: run()\n"
            "finally: assert 'jax' not in sys.modules")
    try:
        printed = subprocess.run(
            [sys.executable, "-c", code, "report", f"--workdir={workdir}"], check=True,
            env=child_environment() | {"JAX_PLATFORMS": "nowhere"}, stdout=subprocess.PIPE,
            text=True).stdout
    finally:
        path.write_text(before)
    assert printed.splitlines()[0].startswith("2 starts, ")
    assert "Mean time to recovery" in printed and "killed by SIGKILL" in printed
    assert printed.splitlines()[-1] == str(workdir / "report.html")
    text = (workdir / "report.html").read_text()
    for piece in ("killed by SIGKILL", "Mean time to recovery", 'id="timeline"'):
        assert piece in text, piece
    (run,) = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])["runs"]
    assert run["curves"]["train/loss"]["step"][-1] == 1500 and len(run["starts"]) == 2
    assert {phase for *_, phase in run["intervals"]} >= {"step", "compilation", "down"}


def test_a_work_directory_without_a_run_has_no_report(tmp_path):
    with pytest.raises(ValueError, match="no ledger.jsonl there"):
        report(tmp_path)


@pytest.mark.parametrize("command,workdir", [
    ("train --workdir=runs/a --config=x", "runs/a"),
    ("train --config=x --workdir runs/a --resume=must", "runs/a"),
    ("train '--workdir=my runs/a' --config=x", "my runs/a"),
    ("train --config=x --workdir 'my runs/a'", "my runs/a"),
    ('train --workdir="it\'s" --config=x', "it's"),
    ("""train '--workdir=a "b" c' --config=x""", 'a "b" c'),
    ("train --workdir=a=b", "a=b"),
    ("train --workdir=a --workdir=b", "b"),
    ("train '--config=x --workdir=a'", None),
    ("train --config.data.workdir=a", None),
    ("train --workdir", None),
])
def test_flags_of_the_supervised_command_are_read_from_its_words(command, workdir):
    assert flag_of(shlex.split(command), "workdir") == workdir
