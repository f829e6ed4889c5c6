"""Kills a small run again and again, and checks that nothing of it is lost.

    python benchmarks/chaos.py [--kills=100] [--seed=0] [--processes=2]

One work directory is trained by the real command, which is killed, stopped, and given damaged files
and disks without room (benchmarks/drills.py), in turn and at random moments, until `--kills` are
done; then it may finish. After every kill the
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
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from absl import app, flags
from drills import CLOCK, DEVICES, DRILLS, EXAMPLES, STEPS_PER_KILL, Run

from batiste.configs.experiment import Experiment
from batiste.data import DataConfig, SourceConfig, order
from batiste.inference import SamplingConfig
from batiste.models import TransformerConfig
from batiste.train.account import read_account
from batiste.train.lines import Lines
from batiste.train.metrics import read_metrics

KILLS = flags.DEFINE_integer("kills", 100, "How often the run is killed or stopped.", 1)
SEED = flags.DEFINE_integer("seed", 0, "Of the moments and the damage.")
PROCESSES = flags.DEFINE_integer("processes", 1, "Of the run; one of them is killed.", 1)
BATCH_SIZE = 8
CONFIG = """
import sys
sys.path.insert(0, {here!r})
from chaos import experiment, instrument


def get_config(corpus):
    instrument()
    return experiment(corpus, {steps})
"""


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
    """In the run: notes which example stands at which position, and sets the clock where asked.

    One of two processes may be killed before they find each other; the other waits for 40 s, not 300.
    """
    sys.modules["batiste.sharding.connect"].INITIALIZATION_SECONDS = 40
    drawn_at, lines = order.Order.drawn_at, Lines(pathlib.Path(os.environ[EXAMPLES]))

    lock = threading.Lock()

    def noted(self, positions):
        found = drawn_at(self, positions)
        line = [sum(self._sizes), [int(at) for at in positions], [int(each) for each in found[0]]]
        with lock:
            lines.add(json.dumps(line) + "\n")
            lines.write()
        return found

    order.Order.drawn_at = noted
    clock, shift = time.time, float(os.environ.get(CLOCK, 0))
    time.time = lambda: clock() + shift


def losses(workdir: pathlib.Path) -> dict[tuple[str, int], float]:
    """Every loss of a run, in all its digits."""
    return {(record["kind"], record["step"]): record["loss"]
            for record in read_metrics(workdir) if "loss" in record}


def examples(run: Run, steps: int) -> list[int]:
    """The example at each position of the training data; another one at a second reading fails."""
    found: dict[tuple[int, int], int] = {}
    for line in run.examples.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # Torn.
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
