"""What watching over a run costs, and whether a healthy run is left in peace.

    python benchmarks/health.py [--rounds=9] [--steps=10]
    python benchmarks/health.py --healthy_steps=2000 --workdir=runs/healthy [--seed=1]

The first times the quickstart's step with its statistics, without them, and without them but with
gradients that are not finite skipped, a few steps each in turn, so that they share whatever else
the machine is doing: read the ratios. The second trains the quickstart for so many steps (about ten
minutes on two free cores) and prints every finding; the same command continues it. Both print
Markdown.
"""

import collections
import copy
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

from batiste.configs.quickstart import get_config
from batiste.data import Batch
from batiste.main import train
from batiste.sharding import MeshConfig, make_mesh, place, replicate
from batiste.train import diagnose, make_program, make_train_step

ROUNDS = flags.DEFINE_integer("rounds", 9, "Turns of each contestant that count.", 1)
STEPS = flags.DEFINE_integer("steps", 10, "Steps in a turn.", 1)
HEALTHY_STEPS = flags.DEFINE_integer("healthy_steps", None, "Steps of a healthy run.")
SEED = flags.DEFINE_integer("seed", 0, "Of the healthy run's weights and order of examples.")
WORKDIR = flags.DEFINE_string("workdir", "runs/healthy", "Of the healthy run.")


def contestant(every: int | None, not_finite: str) -> Callable[[], None]:
    """One step of the quickstart on random tokens, its statistics fetched; returns when it is done."""
    experiment = get_config()
    experiment.model.attention = "reference"
    config = experiment.train
    config.health.every, config.health.policies = every, f"not_finite={not_finite}"
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    program = make_program(experiment.model, config, mesh, MeshConfig(data=1))
    train_step = make_train_step(program, config, mesh)
    random, length = np.random.default_rng(0), experiment.data.sequence_length
    shape = config.batch_size, length
    tokens_BT = random.integers(0, experiment.model.vocab_size, shape).astype(np.int32)
    ones_BT = np.ones_like(tokens_BT)
    positions_BT = np.tile(np.arange(length, dtype=np.int32), (config.batch_size, 1))
    batch = place(
        mesh, Batch(tokens_BT, np.roll(tokens_BT, -1, 1), ones_BT.astype(np.float32), ones_BT,
                    positions_BT), Batch(*("BT",) * 5))
    state = program.initialize()
    factor = None if every is None else replicate(mesh, np.float32(1))

    def step() -> None:
        nonlocal state
        state, metrics = train_step(state, batch, factor)
        jax.device_get(metrics)

    return step


def cost() -> None:
    """Prints the table of step times."""
    steps = {"without": contestant(None, "log"), "statistics": contestant(1, "log"),
             "statistics, and skips what is not finite": contestant(1, "skip")}
    for step in steps.values():
        step()
    seconds, worked = collections.defaultdict(list), collections.defaultdict(list)
    for _ in range(ROUNDS.value):
        for name, step in steps.items():
            start, start_worked = time.perf_counter(), time.process_time()
            for _ in range(STEPS.value):
                step()
            seconds[name].append((time.perf_counter() - start) / STEPS.value)
            worked[name].append((time.process_time() - start_worked) / STEPS.value)
    print("| step | median, ms | × without | CPU, ms | × without |\n|---|---|---|---|---|")
    for name in steps:
        cells = []
        for times in (seconds, worked):
            median = statistics.median(times[name])
            cells += [f"{1e3 * median:.1f}", f"{median / statistics.median(times['without']):.3f}"]
        print(f"| {name} | {' | '.join(cells)} |")


def healthy(steps: int) -> None:
    """Trains, and prints what was found."""
    experiment = copy.deepcopy(get_config())
    experiment.train.num_steps = steps
    experiment.train.seed = experiment.data.seed = SEED.value
    result = train(experiment, WORKDIR.value)
    findings = diagnose(WORKDIR.value)
    print(f"{len(findings)} findings in {result.step:,} steps")
    for finding in findings:
        print(f"- {finding.line()}")


def main(_) -> None:
    """One of the two."""
    if HEALTHY_STEPS.value is None:
        cost()
    else:
        healthy(HEALTHY_STEPS.value)


if __name__ == "__main__":
    app.run(main)
