"""Kills a small run again and again, and checks that nothing of it is lost.

    python benchmarks/chaos.py [--kills=100] [--seed=0] [--processes=2]

One work directory is trained by the real command, which is killed, stopped, and given damaged files,
in turn and at random moments, until `--kills` are done; then it may finish. After every kill the
newest step that verifies is at least as new as the one before (unless that very step was damaged).
At the end all losses and the example of every position of the data are those of a run that nobody
disturbed, bit for bit. Prints a Markdown table; exits with 1 where something was lost.
"""

import collections
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from absl import app, flags

from batiste.configs.experiment import Experiment
from batiste.data import DataConfig, SourceConfig, order
from batiste.inference import SamplingConfig
from batiste.models import TransformerConfig
from batiste.train.account import read_account
from batiste.train.ledger import LEDGER_FILE
from batiste.train.manifest import CHECKPOINT_FOLDER, newest_verified, numbered
from batiste.train.metrics import METRICS_FILE, read_metrics

KILLS = flags.DEFINE_integer("kills", 100, "How often the run is killed or stopped.", 1)
SEED = flags.DEFINE_integer("seed", 0, "Of the moments and the damage.")
PROCESSES = flags.DEFINE_integer("processes", 1, "Of the run; one of them is killed.", 1)
DEVICES = 4  # Of the run, over all its processes: another number sums in another order.
STEPS_PER_KILL = 40
EXAMPLES, CLOCK = "CHAOS_EXAMPLES", "CHAOS_CLOCK_SECONDS"
WAIT_SECONDS = 300
CONFIG = """
import os, sys
sys.path.insert(0, {here!r})
from chaos import experiment, instrument


def get_config(corpus):
    instrument()
    return experiment(corpus, {steps})
"""


BATCH_SIZE = 8


def experiment(corpus: str, steps: int) -> Experiment:
    """A very small model of bytes, with dropout, saved every ten steps."""
    config = Experiment(
        model=TransformerConfig(
            vocab_size=300, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8,
            mlp_dim=24, max_length=32, dropout=0.1,
        ),
        data=DataConfig(
            sources=(SourceConfig(path=corpus),), tokenizer="characters", sequence_length=32,
            validation_fraction=0.2,
        ),
        sample=SamplingConfig(max_tokens=3, prompts=("a",)),
    )
    config.train.num_steps, config.train.batch_size = steps, BATCH_SIZE
    config.train.schedule.warmup_steps = 3
    config.train.checkpoint.every, config.train.evaluation.every = 10, 50
    return config


def instrument() -> None:
    """In the run: notes which example stands at which position, and sets the clock where asked."""
    records_at = order.Order.records_at

    def noted(self, positions):
        found = records_at(self, positions)
        line = [sum(self._sizes), [int(at) for at in positions], [int(each) for each in found]]
        with open(os.environ[EXAMPLES], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return found

    order.Order.records_at = noted
    clock, shift = time.time, float(os.environ.get(CLOCK, 0))
    time.time = lambda: clock() + shift


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
        before = self._recoveries()
        return lambda: self._recoveries() > before

    def steps_later(self, steps: int) -> Callable[[], bool]:
        """Whether so many more steps have been written down."""
        path = self.workdir / METRICS_FILE
        wanted = path.read_bytes().count(b'"train"') + steps
        return lambda: path.read_bytes().count(b'"train"') >= wanted

    def newest(self) -> int:
        """The newest step that verifies, 0 for none."""
        return newest_verified(self.workdir / CHECKPOINT_FOLDER).step or 0

    def _recoveries(self) -> int:
        path = self.workdir / LEDGER_FILE
        return path.read_bytes().count(b'"first step"') if path.is_file() else 0


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


def sigterm(run: Run, dice: random.Random) -> None:
    """SIGTERM: saves, and says so by its exit code."""
    run.start()
    going = run.until(run.next_step()) and run.until(run.steps_later(dice.randrange(9)))
    dice.choice(run.processes).send_signal(signal.SIGTERM)
    codes = run.wait()
    assert not going or codes in ([143] * run.count, [0] * run.count), codes


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
    ("SIGTERM", sigterm, None),
    ("damaged step, SIGKILL", after_a_step, damage_a_step),
    ("SIGTERM storm", sigterm_storm, None),
    ("damaged data, SIGKILL", after_a_step, damage_the_data),
    ("clock hours back, SIGKILL", clock_back, None),
)


def losses(workdir: pathlib.Path) -> dict[tuple[str, int], float]:
    """Every loss of a run, in all its digits."""
    return {(record["kind"], record["step"]): record["loss"]
            for record in read_metrics(workdir) if "loss" in record}


def examples(run: Run, steps: int) -> list[int]:
    """The example at each position of the training data; another one at a second reading fails."""
    found: dict[tuple[int, int], int] = {}
    for line in run.examples.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # Torn by a kill.
            records, positions, examples = json.loads(line)
            for position, example in zip(positions, examples, strict=True):
                if found.setdefault((records, position), example) != example:
                    raise AssertionError(f"another example at position {position}")
    train = max(records for records, _ in found)
    return [found[train, position] for position in range(steps * BATCH_SIZE)]


def torment(folder: pathlib.Path, run: Run, kills: int, dice: random.Random) -> dict[str, int]:
    """Drills a run `kills` times in turn, then lets it end; how often which drill.

    Raises AssertionError where a committed step is lost, or it does not end well.
    """
    done = collections.Counter()
    for number in range(kills):
        name, attack, harm = DRILLS[number % len(DRILLS)]
        if harm is not None:
            harm(run, dice)
        before = run.newest()
        attack(run, dice)
        after = run.newest()
        print(f"{number + 1}: {name}: step {before}, {after}", file=sys.stderr, flush=True)
        if after < before:
            raise AssertionError(f"{name}: step {before} was committed, {after} is the newest")
        done[name] += 1
    run.start()
    if any(run.wait()):
        raise AssertionError(f"did not end well: {(folder / 'output.txt').read_text()[-2000:]}")
    return dict(done)


def compare(run: Run, calm: Run, steps: int) -> None:
    """Raises AssertionError where a loss or an example is not that of the run left in peace."""
    found, expected = losses(run.workdir), losses(calm.workdir)
    wrong = [key for key in expected if found.get(key) != expected[key]]
    if wrong or found.keys() != expected.keys():
        raise AssertionError(f"{len(wrong)} losses differ, first {wrong[:1]}")
    if examples(run, steps) != examples(calm, steps):
        raise AssertionError("other examples")


@contextlib.contextmanager
def scene(steps: int) -> Iterator[pathlib.Path]:
    """A folder with a corpus and a config, removed when all went well."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="batiste_chaos_"))
    (folder / "corpus").mkdir()
    for index in range(60):
        text = "".join(f"{index * line} is {index} times {line}\n" for line in range(60))
        (folder / "corpus" / f"{index}.txt").write_text(text)
    here = str(pathlib.Path(__file__).resolve().parent)
    (folder / "config.py").write_text(CONFIG.format(here=here, steps=steps))
    yield folder
    shutil.rmtree(folder)


def main(argv: list[str]) -> None:
    del argv
    steps = STEPS_PER_KILL * KILLS.value
    with scene(steps) as folder:
        calm = Run(folder, "calm", PROCESSES.value)
        calm.start()
        assert not any(calm.wait()), (folder / "output.txt").read_text()[-2000:]
        run = Run(folder, "run", PROCESSES.value)
        done = torment(folder, run, KILLS.value, random.Random(SEED.value))
        compare(run, calm, steps)
        account = read_account(run.workdir)
    first = sorted(start.recovered - start.begin for start in account.starts
                   if start.recovered is not None)
    kinds = ", ".join(f"{count} × {name}" for name, count in done.items())
    rows = {
        "kills": f"{sum(done.values())} ({kinds})",
        "committed steps lost": "0",
        "losses, and examples by position, equal to the run left in peace":
            f"{steps} steps, bit for bit",
        "steps done and not committed when it died, and done again": f"{account.steps_recomputed}",
        "s from a start to its first step: p50, p95":
            f"{statistics.median(first):.1f}, {first[int(0.95 * (len(first) - 1))]:.1f}",
        "goodput (productive step time / all time)": f"{100 * account.goodput:.1f} %",
    }
    print(f"Python {platform.python_version()}, jax {importlib.metadata.version('jax')}, "
          f"{PROCESSES.value} process(es) of {DEVICES // PROCESSES.value} devices, "
          f"{sum(account.seconds.values()) / 60:.0f} minutes\n\n| | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    app.run(main)
