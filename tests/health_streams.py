"""Streams of health records of a tiny model, healthy and with a fault, and what a detector says."""

import functools
import itertools
from typing import Any

import jax
import numpy as np

from batiste.configs.experiment import Experiment, flatten
from batiste.data import Batch
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig, make_mesh, place
from batiste.train import TrainConfig, faulty_batches, make_program, make_train_step, parse_fault
from batiste.train.detector import Detector
from batiste.train.findings import Finding
from batiste.train.health_record import health_record, target_record

STEPS, BEGUN, ROWS, VOCAB = 80, 45, 8, 31
MODEL = TransformerConfig(
    vocab_size=VOCAB, num_layers=3, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8,
    mlp_dim=24, max_length=16, activation="relu2",
)
IN_STEP = ("nan_gradient", "activation", "dead_layer", "frozen", "no_gradient", "learning_rate")


def settings(**changes) -> dict[str, Any]:
    """The flat config of the streams; a name's dots are written as __."""
    experiment = Experiment(model=MODEL)
    experiment.train.num_steps, experiment.train.health.window = STEPS, 24
    return flatten(experiment) | {name.replace("__", "."): value for name, value in changes.items()}


def batch(number: int) -> Batch:
    """Rows of a chain that is mostly the same step on a ring of tokens, so that much is learned."""
    random = np.random.default_rng(number)
    steps_BT = np.where(random.random((ROWS, 17)) < 0.2, random.integers(0, VOCAB, (ROWS, 17)), 7)
    steps_BT[:, 0] = random.integers(0, VOCAB, ROWS)
    tokens_BT = (steps_BT.cumsum(axis=1) % VOCAB).astype(np.int32)
    ones_BT = np.ones((ROWS, 16), np.int32)
    positions_BT = np.tile(np.arange(16, dtype=np.int32), (ROWS, 1))
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], ones_BT.astype(np.float32), ones_BT,
                 positions_BT)


@functools.cache
def _program(fault: str | None):
    config = TrainConfig(num_steps=STEPS, batch_size=ROWS, faults=fault)
    config.health.policies = "not_finite=skip"
    config.schedule.warmup_steps, config.schedule.learning_rate = 5, 0.01
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    program = make_program(MODEL, config, mesh, MeshConfig(data=1))
    return mesh, program, make_train_step(program, config, mesh)


@functools.cache
def stream(text: str | None) -> list[dict[str, Any]]:
    """The records of a run with a fault; those of data need no program of their own."""
    fault = parse_fault(text)
    mesh, program, step = _program(text if fault and fault.kind in IN_STEP else None)
    state, records = program.initialize(), []
    numbered = ((number, batch(number)) for number in itertools.count())
    batches = faulty_batches(fault, numbered, VOCAB)
    for number in range(1, STEPS + 1):
        read = next(batches)
        state, metrics = step(state, place(mesh, read, Batch(*("BS",) * 5)))
        metrics = jax.device_get(metrics)
        statistics = metrics.pop("health")
        values = {name: float(value) for name, value in metrics.items()}
        records.append({"step": number, **health_record(
            statistics, values, 0.1, 0.001, target_record(read))})
    return records


def findings(records: list[dict[str, Any]], **changes) -> list[Finding]:
    """What a detector finds in them."""
    detector = Detector(settings(**changes), lambda step: range(100 * step, 100 * step + ROWS))
    return [finding for record in records for finding in detector.observe(record)]
