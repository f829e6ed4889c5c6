"""The machine that this process runs on: its devices, their memory, and what its CPU can do."""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from batiste.data import Batch
from batiste.planning.workload import Machine, Measured, Workload
from batiste.sharding import MeshConfig, make_mesh, place
from batiste.sharding.devices import Device, find_device
from batiste.train import make_program, make_train_step, total_peak_flops

# With imports, compilation and the search, 20 seconds in all on two cores.
SECONDS = 12.0
# A step of the benchmark should not take longer; 1e11 FLOP/s is one slow core.
FLOPS_OF_A_STEP = 2e11


def machine_here() -> Machine | None:
    """The devices that jax sees and their memory; None where nobody says how much that is.

    Fake CPU devices share the memory of the machine.
    """
    devices = jax.devices()
    kind, platform = devices[0].device_kind, devices[0].platform
    if platform == "cpu":
        return Machine(_cpu_device(1.0, jax.local_device_count()), len(devices))
    device = find_device(kind)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if device is None:
        if limit is None:
            return None
        device = _cpu_device(1.0, 1)._replace(kind=kind, name=kind)
    return Machine(device if limit is None else device._replace(hbm_bytes=limit), len(devices))


def measure_cpu(workload: Workload) -> Machine:
    """The CPU of this machine, with seconds of real training steps of one and of two layers.

    Layers are as wide as the model's, rows as long as its rows and, if they are few enough, as
    many: a benchmark of 12 seconds, or of four steps where those take longer.
    """
    started = time.perf_counter()
    mesh = make_mesh(MeshConfig(data=1), jax.devices("cpu")[:1])
    peak, _ = total_peak_flops(mesh, workload.model.dtype)
    pattern = len(workload.model.layer_pattern)
    rows = _rows(workload)
    steps = {count: _step(workload, count * pattern, rows, mesh) for count in (1, 2)}
    seconds: dict[int, list[float]] = {1: [], 2: []}
    while len(seconds[2]) < 2 or time.perf_counter() - started < SECONDS:
        for count, step in steps.items():
            before = time.perf_counter()
            step()
            seconds[count].append(time.perf_counter() - before)
    one, two = (statistics.median(seconds[count]) for count in (1, 2))
    tokens = rows * workload.length
    layer = max(two - one, 0.0) / pattern / tokens
    measured = Measured(layer, max(one / tokens - layer * pattern, 0.0))
    return Machine(_cpu_device(peak, 1), 1, measured=measured)


def _step(workload: Workload, num_layers: int, rows: int, mesh: jax.sharding.Mesh) -> Callable:
    """A call that runs one training step to its end; compiled when this returns."""
    model = dataclasses.replace(
        workload.model, num_layers=num_layers, attention="reference", remat="none"
    )
    config = dataclasses.replace(workload.train, batch_size=rows, accumulation=1)
    program = make_program(model, config, mesh, MeshConfig(data=1))
    step = make_train_step(program, config, mesh)
    shape = (rows, workload.length)
    tokens_BT = np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32)
    ones_BT = np.ones(shape, np.int32)
    positions_BT = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    values = {"tokens": tokens_BT, "targets": tokens_BT, "weights": ones_BT.astype(np.float32),
              "segments": ones_BT, "positions": positions_BT}
    batch = Batch(**{name: values[name.split("_")[-2]] for name in workload.arrays})
    batch = place(mesh, batch, jax.tree.map(lambda _: "BT", batch))
    state = program.initialize()

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    run()
    return run


def _rows(workload: Workload) -> int:
    """Rows of a micro-batch, or fewer, so that a step of two layers stays short."""
    model, train = workload.model, workload.train
    weights = 4 * model.model_dim * model.mlp_dim + model.model_dim * model.vocab_size
    affordable = int(FLOPS_OF_A_STEP / (6 * weights * workload.length))
    return max(1, min(train.batch_size // train.accumulation, affordable))


def _cpu_device(peak: float, shared_by: int) -> Device:
    """The CPU as an entry of the table; its bandwidths are in what is measured."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / shared_by
    return Device(
        "cpu", "cpu", {"bfloat16": peak}, memory, math.inf, math.inf, math.inf, 0, shared_by, 1
    )
