"""Speed of one training step of a 14 M-parameter model, beside PyTorch when it is installed.

    python benchmarks/train_step.py [--rounds=6] [--steps=4]

6 layers, D 384, 6 heads, F 1536 (GELU), context 256, vocabulary 8192, batch 16, AdamW. All contestants
run in one process, a few steps each in turn, so that they share whatever else the machine is doing:
read the ratios. Prints a Markdown table.
"""

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

from batiste.data import Batch
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig, make_mesh, place
from batiste.train import TrainConfig, make_program, make_train_step

ROUNDS = flags.DEFINE_integer("rounds", 6, "Turns of each contestant that count.", 1)
STEPS = flags.DEFINE_integer("steps", 4, "Steps in a turn.", 1)
LENGTH, BATCH_SIZE, VOCAB_SIZE, LAYERS = 256, 16, 8192, 6


def batiste_step(dtype: str, scan_unroll: int) -> Callable[[], None]:
    """One step of ours on random tokens; returns when it is done."""
    model = TransformerConfig(
        vocab_size=VOCAB_SIZE, num_layers=LAYERS, model_dim=384, num_heads=6, num_kv_heads=6,
        head_dim=64, mlp_dim=1536, max_length=LENGTH, activation="gelu", norm="layer",
        positions="learned", dtype=dtype, scan_unroll=scan_unroll,
    )
    config = TrainConfig(batch_size=BATCH_SIZE)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    program = make_program(model, config, mesh, MeshConfig(data=1))
    train_step = make_train_step(program, config, mesh)
    random = np.random.default_rng(0)
    tokens_BT = random.integers(0, VOCAB_SIZE, (BATCH_SIZE, LENGTH)).astype(np.int32)
    positions_BT = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH_SIZE, 1))
    ones_BT = np.ones_like(tokens_BT)
    batch = place(
        mesh, Batch(tokens_BT, np.roll(tokens_BT, -1, 1), ones_BT.astype(np.float32), ones_BT,
                    positions_BT), Batch(*("BT",) * 5),
    )
    state = program.initialize()

    def step() -> None:
        nonlocal state
        state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics)

    return step


def torch_step(dtype: str) -> Callable[[], None]:
    """One step of the compiled PyTorch twin."""
    import torch
    from torch_twin import TwinShape, build_step

    step = build_step(TwinShape(), dtype)
    tokens_BT = torch.randint(0, VOCAB_SIZE, (BATCH_SIZE, LENGTH))
    targets_BT = tokens_BT.roll(-1, 1)
    return lambda: step(tokens_BT, targets_BT)


def contestants() -> dict[str, Callable[[], Callable[[], None]]]:
    """Who runs; PyTorch only where it is installed."""
    runners = {
        "batiste fp32": lambda: batiste_step("float32", LAYERS),
        "batiste bf16": lambda: batiste_step("bfloat16", LAYERS),
        "batiste bf16, scan not unrolled": lambda: batiste_step("bfloat16", 1),
    }
    try:
        importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return runners
    return runners | {
        "torch.compile fp32": lambda: torch_step("fp32"),
        "torch.compile bf16": lambda: torch_step("bf16"),
    }


def main(argv: list[str]) -> None:
    """Compiles all, then measures them in turn."""
    del argv
    steps, compile_seconds = {}, {}
    for name, build in contestants().items():
        start = time.perf_counter()
        steps[name] = build()
        steps[name]()
        compile_seconds[name] = time.perf_counter() - start
        steps[name]()
    rates = {name: [] for name in steps}
    cpu_seconds = {name: [] for name in steps}
    for _ in range(ROUNDS.value):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(STEPS.value):
                step()
            tokens = STEPS.value * BATCH_SIZE * LENGTH
            rates[name].append(tokens / (time.perf_counter() - wall))
            cpu_seconds[name].append((time.process_time() - cpu) / tokens * 1e6)
    versions = [f"{package} {importlib.metadata.version(package)}" for package in ("jax", "torch")
                if package == "jax" or "torch.compile fp32" in steps]
    print(f"Python {platform.python_version()}, {', '.join(versions)}; median of {ROUNDS.value} "
          f"turns of {STEPS.value} steps\n")
    print("| step | tokens/s | min–max | CPU-s per M tokens | build and first step, s "
          "| × torch.compile |\n|---|---|---|---|---|---|")
    for name in steps:
        twin = f"torch.compile {'bf16' if 'bf16' in name else 'fp32'}"
        ratio = ""
        if twin in rates:
            ratio = f"{statistics.median(a / b for a, b in zip(rates[name], rates[twin])):.2f}"
        print(f"| {name} | {statistics.median(rates[name]):,.0f} "
              f"| {min(rates[name]):,.0f}–{max(rates[name]):,.0f} "
              f"| {statistics.median(cpu_seconds[name]):,.0f} | {compile_seconds[name]:.1f} "
              f"| {ratio} |")


if __name__ == "__main__":
    app.run(main)
