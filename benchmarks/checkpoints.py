"""What hashing costs a checkpoint of 400 MB: time blocked, time until committed, time to restore.

    python benchmarks/checkpoints.py [--rounds=7] [--megabytes=400]

Ours (hashed before a step counts, verified before it is read) and Orbax's own manager with the same
arrays, in turn, in one process. While a save is under way the main thread multiplies matrices, as a
step would. Prints a Markdown table of medians.
"""

import importlib.metadata
import pathlib
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import app, flags

from batiste.train import Checkpoints, TrainState
from batiste.train.config import CheckpointConfig

ROUNDS = flags.DEFINE_integer("rounds", 7, "Saves of each that count, after one that does not.", 1)
MEGABYTES = flags.DEFINE_integer("megabytes", 400, "Size of the state.", 1)
COLUMNS = ("blocked by a save, ms", "save until committed, ms", "products meanwhile", "restore, ms")


def make_state(megabytes: int) -> TrainState:
    """Parameters and two moments of them, in 36 arrays."""
    size = megabytes * 10**6 // 36 // 4
    keys = iter(jax.random.split(jax.random.key(0), 36))
    trees = [{str(i): jax.random.normal(next(keys), (size,)) for i in range(12)} for _ in range(3)]
    return jax.block_until_ready(TrainState(jnp.int32(0), trees[0], tuple(trees[1:]), None))


def ours(folder: pathlib.Path) -> tuple[Callable, Callable, Callable]:
    """Save, wait and restore of batiste."""
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=1))

    def restore(step: int, abstract: TrainState) -> TrainState:
        assert checkpoints.newest_verified().step == step
        return checkpoints.restore(step, abstract)

    return (lambda step, state: checkpoints.save(step, state, {}),
            lambda step, state: checkpoints.finish(step, state, {}), restore)


def orbax(folder: pathlib.Path) -> tuple[Callable, Callable, Callable]:
    """Save, wait and restore of Orbax's manager."""
    manager = ocp.CheckpointManager(
        folder / "orbax", options=ocp.CheckpointManagerOptions(max_to_keep=1))
    return (lambda step, state: manager.save(step, args=ocp.args.StandardSave(state._asdict())),
            lambda step, state: manager.wait_until_finished(),
            lambda step, abstract: manager.restore(
                step, args=ocp.args.StandardRestore(abstract._asdict())))


def one_round(calls: tuple, step: int, state: TrainState, work: Callable) -> list[float]:
    """One save and one restore; the figures of COLUMNS."""
    save, wait, restore = calls
    begun = time.perf_counter()
    save(step, state)
    blocked = time.perf_counter() - begun
    products, until = 0, time.perf_counter() + 1.0
    while time.perf_counter() < until:
        work()
        products += 1
    paused = time.perf_counter()
    wait(step, state)
    # A save that was over while products were made is not longer for it.
    waited = time.perf_counter() - paused
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)
    restoring = time.perf_counter()
    jax.block_until_ready(restore(step, abstract))
    return [1e3 * blocked, 1e3 * (blocked + 1.0 + waited), products,
            1e3 * (time.perf_counter() - restoring)]


def main(argv: list[str]) -> None:
    del argv
    state = make_state(MEGABYTES.value)
    square = jnp.ones((512, 512))
    multiply = jax.jit(lambda x: x @ x / 512)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="batiste_checkpoints_"))
    rows: dict[str, list] = {"orbax, not hashed": [], "batiste, hashed and verified": []}
    try:
        contestants = dict(zip(rows, (orbax(folder), ours(folder)), strict=True))
        for turn in range(ROUNDS.value + 1):
            for name, calls in contestants.items():
                figures = one_round(calls, turn, state, lambda: multiply(square).block_until_ready())
                if turn:
                    rows[name].append(figures)
    finally:
        shutil.rmtree(folder)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}"
                         for name in ("jax", "orbax-checkpoint", "xxhash"))
    print(f"Python {platform.python_version()}, {versions}; {MEGABYTES.value} MB, medians of "
          f"{ROUNDS.value} rounds (min–max)\n\n| checkpoint | {' | '.join(COLUMNS)} |")
    print("|---|" + "---|" * len(COLUMNS))
    for name, figures in rows.items():
        cells = [f"{statistics.median(column):,.0f} ({min(column):,.0f}–{max(column):,.0f})"
                 for column in zip(*figures, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    app.run(main)
