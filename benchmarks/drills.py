"""What is done to a run by benchmarks/chaos.py: kills, signals, damaged files, disks without room."""

import contextlib
import os
import pathlib
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from batiste.train.ledger import LEDGER_FILE
from batiste.train.manifest import CHECKPOINT_FOLDER, newest_verified, numbered
from batiste.train.metrics import METRICS_FILE

DEVICES = 4  # Of the run, over all its processes: another number sums in another order.
STEPS_PER_KILL = 40
EXAMPLES, CLOCK = "CHAOS_EXAMPLES", "CHAOS_CLOCK_SECONDS"
WAIT_SECONDS = 300


class Run:
    """The command on a work directory, as one or several processes."""

    def __init__(self, folder: pathlib.Path, name: str, processes: int):
        self.folder, self.workdir, self.count = folder, folder / name, processes
        self.examples = folder / f"{name}.examples"
        self.processes: list[subprocess.Popen] = []

    def start(self, clock_seconds: float = 0.0) -> None:
        """Starts it."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", EXAMPLES: str(self.examples), CLOCK: str(clock_seconds),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // self.count}",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", "batiste", "train",
                   f"--config={self.folder}/config.py:{self.folder}/corpus/*.txt",
                   f"--workdir={self.workdir}"]
        joined = []
        if self.count > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                joined = [f"--coordinator_address=127.0.0.1:{free.getsockname()[1]}",
                          f"--num_processes={self.count}"]
        with open(self.folder / "output.txt", "ab") as output:
            self.processes = [
                subprocess.Popen([*command, *joined, *([f"--process_id={i}"] if joined else [])],
                                 env=environment, stdout=output, stderr=output)
                for i in range(self.count)]

    def until(self, happened: Callable[[], bool]) -> bool:
        """Waits for something to happen; False when the run ended before it did."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not happened():
            if self.processes[0].poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing for {WAIT_SECONDS} s; see {self.folder}/output.txt")
            time.sleep(0.002)
        return True

    def wait(self) -> list[int]:
        """Waits for all to end, which they must without help; their exit codes."""
        return [process.wait(WAIT_SECONDS) for process in self.processes]

    def next_step(self) -> Callable[[], bool]:
        """Whether this start has done a step."""
        before = self.noted("first step")
        return lambda: self.noted("first step") > before

    def steps_later(self, steps: int) -> Callable[[], bool]:
        """Whether so many more steps have been written down."""
        path = self.workdir / METRICS_FILE
        wanted = path.read_bytes().count(b'"train"') + steps
        return lambda: path.read_bytes().count(b'"train"') >= wanted

    def newest(self) -> int:
        """The newest step that verifies, 0 for none."""
        return newest_verified(self.workdir / CHECKPOINT_FOLDER).step or 0

    def noted(self, event: str) -> int:
        """How often the ledger says that this happened."""
        path = self.workdir / LEDGER_FILE
        return path.read_bytes().count(f'"{event}"'.encode()) if path.is_file() else 0


def kill(run: Run, dice: random.Random, number: int = signal.SIGKILL) -> None:
    """One process of the run, whichever; the others end by themselves."""
    dice.choice(run.processes).send_signal(number)
    run.wait()


def at_any_moment(run: Run, dice: random.Random) -> None:
    """SIGKILL while it imports, prepares, compiles, restores, or trains."""
    run.start()
    time.sleep(dice.uniform(0, 8))
    kill(run, dice)


def after_a_step(run: Run, dice: random.Random) -> None:
    """SIGKILL while it trains."""
    run.start()
    if run.until(run.next_step()):
        run.until(run.steps_later(dice.randrange(STEPS_PER_KILL)))
    kill(run, dice)


def in_a_save(run: Run, dice: random.Random) -> None:
    """SIGKILL while a checkpoint is written."""
    run.start()
    if run.until(run.next_step()):
        folder = run.workdir / CHECKPOINT_FOLDER
        if run.until(lambda: any(folder.glob("*.unfinished"))):
            time.sleep(dice.uniform(0, 0.05))
    kill(run, dice)


def stop(run: Run, dice: random.Random) -> None:
    """SIGTERM or SIGINT: saves, and says so by its exit code."""
    run.start()
    number = dice.choice((signal.SIGTERM, signal.SIGINT))
    going = run.until(run.next_step()) and run.until(run.steps_later(dice.randrange(9)))
    dice.choice(run.processes).send_signal(number)
    codes = run.wait()
    if going and codes not in ([128 + number] * run.count, [0] * run.count):
        raise AssertionError(f"{number.name} ended with {codes}")


def sigterm_storm(run: Run, dice: random.Random) -> None:
    """Six SIGTERMs in a second."""
    run.start()
    run.until(run.next_step())
    for _ in range(6):
        with contextlib.suppress(ProcessLookupError):
            dice.choice(run.processes).send_signal(signal.SIGTERM)
        time.sleep(dice.uniform(0, 0.3))
    run.wait()


def clock_back(run: Run, dice: random.Random) -> None:
    """The clock is hours behind that of the start before; then SIGKILL."""
    run.start(clock_seconds=-dice.uniform(3600, 36000))
    run.until(run.next_step())
    kill(run, dice)


def full_disk(run: Run, dice: random.Random) -> None:
    """No file may grow for a while (a limit stands for the disk); SIGKILL while it is full, or when
    a step was saved after it."""
    run.start()
    if run.until(run.next_step()):
        run.until(run.steps_later(dice.randrange(9)))
        _limit(run, 0)
        time.sleep(dice.uniform(0, 2))
        if dice.random() < 0.5:
            _limit(run, resource.RLIM_INFINITY)
            saved = run.noted("saved")
            run.until(lambda: run.noted("saved") > saved)
    kill(run, dice)


def _limit(run: Run, size: int) -> None:
    """The size in bytes that files of the run may have."""
    for process in run.processes:
        with contextlib.suppress(ProcessLookupError):
            hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


def no_folder(run: Run, dice: random.Random) -> None:
    """Nothing can be written where checkpoints go, until a save has failed; then SIGKILL."""
    run.start()
    folder = run.workdir / CHECKPOINT_FOLDER
    aside = folder.with_suffix(".aside")
    if run.until(run.next_step()) and run.until(folder.is_dir):
        failures = run.noted("save_failed")
        folder.rename(aside)
        folder.write_text("not a directory")
        run.until(lambda: run.noted("save_failed") > failures)
    kill(run, dice)
    if aside.is_dir():
        folder.unlink()
        aside.rename(folder)


def damage(path: pathlib.Path, dice: random.Random) -> None:
    """Flips a bit, cuts off the end, or removes the file."""
    data = bytearray(path.read_bytes())
    way = dice.choice(("flip", "truncate", "remove")) if data else "remove"
    if way == "flip":
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.unlink()
    if way != "remove":
        path.write_bytes(data if way == "flip" else data[:dice.randrange(len(data))])
    print(f"{way} {path}", file=sys.stderr, flush=True)


def damage_a_step(run: Run, dice: random.Random) -> None:
    """Damages a file of the newest step, where there is one before it."""
    folder = run.workdir / CHECKPOINT_FOLDER
    if len(numbered(folder)) > 1:
        files = (folder / str(numbered(folder)[-1])).rglob("*")
        damage(dice.choice(sorted(path for path in files if path.is_file())), dice)


def damage_the_data(run: Run, dice: random.Random) -> None:
    """Damages a file of the prepared data."""
    files = sorted(path for path in run.workdir.glob("data/*/**/*") if path.is_file())
    if files:
        damage(dice.choice(files), dice)


Harm = Callable[[Run, random.Random], None]
# What is done, after which harm to the files.
DRILLS: tuple[tuple[str, Harm, Harm | None], ...] = (
    ("SIGKILL in a save", in_a_save, None),
    ("SIGKILL at any moment", at_any_moment, None),
    ("SIGKILL after a step", after_a_step, None),
    ("SIGTERM or SIGINT", stop, None),
    ("damaged step, SIGKILL", after_a_step, damage_a_step),
    ("SIGTERM storm", sigterm_storm, None),
    ("damaged data, SIGKILL", after_a_step, damage_the_data),
    ("clock hours back, SIGKILL", clock_back, None),
    ("full disk", full_disk, None),
    ("no folder to save in, SIGKILL", no_folder, None),
)
