"""Trains a task from an encoder's weights, or goes on, and says how good it is."""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash

from batiste.data import Order, TextReader
from batiste.models import TransformerConfig, resolve_attention
from batiste.sharding import RULES, Share, make_mesh
from batiste.tasks.config import TaskConfig
from batiste.tasks.examples import Example, check_examples, class_weights
from batiste.tasks.heads import TaskModel
from batiste.tasks.metrics import measure
from batiste.tasks.rows import Encoded, TaskBatch, encode
from batiste.tasks.step import Answers, joined, make_answers, make_task_step, weighted
from batiste.train import (
    Checkpoints, Ledger, MetricsWriter, Progress, Records, Run, TrainState, arrays_of,
    check_mode, check_same, compilation_booked, fit, make_program,
)

# These change where a step is computed and what is recorded, not what it computes.
FREE_TO_CHANGE = ("mesh.", "checkpoint.", "evaluation.", "patience")


class Given(NamedTuple):
    """What a task begins with: the encoder's config, and what reads texts for it; the examples of
    both splits; weights: the encoder's parameters, when they are asked for."""

    model: TransformerConfig
    reader: TextReader
    train: Sequence[Example]
    validation: Sequence[Example]
    weights: Callable[[], Any]


class Tuned(NamedTuple):
    """Why it ended, as `train.fit` says, after which step; the metrics of each head over the
    validation examples; the trained parameters."""

    reason: str
    step: int
    metrics: dict[str, dict[str, float]]
    params: Any


class Task:
    """A task's program on a mesh of devices (None: of all), and its examples as arrays.

    Raises ValueError for what does not fit together.
    """

    def __init__(
        self, config: TaskConfig, given: Given, devices: Sequence[jax.Device] | None = None
    ):
        if jax.process_count() > 1:
            raise ValueError(f"{jax.process_count()} processes: a task is tuned by one, on all of "
                             "its devices: start one")
        devices = jax.devices() if devices is None else devices
        config.validate_on(len(devices))
        for field, examples in (("train_data", given.train), ("validation_data", given.validation)):
            check_examples(config, examples, field)
        if config.max_length > given.model.max_length:
            raise ValueError(f"max_length={config.max_length}: the encoder has places for at most "
                             f"{given.model.max_length} tokens")
        self.config, self.given = config, given
        self.mesh = make_mesh(config.mesh, devices)
        module = functools.partial(TaskModel, heads=config.heads)
        model = dataclasses.replace(given.model, dropout=config.dropout, dtype=config.dtype)
        kind = self.mesh.devices.flat[0].device_kind
        model, _ = resolve_attention(model, kind, self.mesh.shape)
        self.program = make_program(model, config.train, self.mesh, config.mesh, module)
        weights = {head.name: class_weights(head, given.train) for head in config.heads}
        self.train_step = make_task_step(self.program, config, weights, self.mesh)
        self._answers = make_answers(self.program, config, weights, self.mesh)

    @functools.cached_property
    def train(self) -> TaskBatch:
        """The training examples as arrays."""
        return encode(self.config, self.given.train, self.given.reader).batch

    @functools.cached_property
    def validation(self) -> Encoded:
        """The validation examples as arrays, and as they were read."""
        return encode(self.config, self.given.validation, self.given.reader)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of everything that a step reads: texts, labels, tokenizer."""
        digest = xxhash.xxh3_128(self.given.reader.hash.encode())
        for leaf in jax.tree.leaves(self.train):
            digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
        return digest.hexdigest()

    def begin(self) -> TrainState:
        """The state before the first step: the encoder's weights under new heads."""
        drawn = self.program.initialize()
        places = jax.tree.map(
            lambda leaf: leaf.sharding, self.program.abstract_state.params["encoder"])
        encoder = jax.device_put(self.given.weights(), places)
        return self.program.begin(drawn.params | {"encoder": encoder})

    def indices(self, start: int) -> Iterator[np.ndarray]:
        """The examples of each step from `start` on: a function of the seed and the step alone.

        Every epoch has each example once; with `balanced`, every class comes equally often, and
        each of its examples once before any comes again.
        """
        config, count = self.config, len(self.given.train)
        groups = np.zeros(count, np.int64)
        if config.balanced is not None:
            groups = self.train.labels[config.balanced].values
        by_group, sizes = np.argsort(groups, kind="stable"), np.bincount(groups)
        sizes = sizes[sizes > 0].tolist()
        order = Order(sizes, [1.0] * len(sizes), config.seed)
        for step in itertools.count(start):
            positions = step * config.batch_size + np.arange(config.batch_size)
            yield by_group[order.records_at(positions)]

    def batches(self, start: int) -> Iterator[TaskBatch]:
        """The batch of each step from `start` on, on the mesh."""
        share = Share(self.mesh, self.config.batch_size)
        for indices in self.indices(start):
            yield share.place(self.train.take(indices))

    def answers(self, params: Any, max_batches: int | None = None) -> Answers:
        """What the model says of the validation examples, or of those of the first batches."""
        rows = np.prod([self.mesh.shape[axis] for axis in RULES["B"]])
        size = int(-(-self.config.batch_size // rows) * rows)
        share, count = Share(self.mesh, size), len(self.given.validation)
        starts = list(range(0, count, size))[:max_batches]
        parts = []
        for start in starts:
            batch = self.validation.batch.take(np.arange(start, start + size))
            parts.append(jax.device_get(self._answers(params, share.place(batch))))
        return joined(self.config, parts, min(count, len(starts) * size))

    def measure(self, params: Any) -> dict[str, dict[str, float]]:
        """The metrics of each head over all validation examples."""
        answers = self.answers(params)
        return {head.name: measure(head, self.given.validation, self.validation, answers)
                for head in self.config.heads}


def tune(
    config: TaskConfig, given: Given, workdir: str | os.PathLike, fields: dict[str, Any],
    resume: str = "auto",
) -> Tuned:
    """Trains in `workdir`, from its newest checkpoint if it has one, and measures.

    fields: what a checkpoint remembers of the config. resume: as in `batiste.main.train`. Raises
    ValueError for a task that cannot be, or that differs from the checkpoint's.
    """
    task, workdir = Task(config, given), pathlib.Path(workdir)
    arrays = arrays_of(task.program.abstract_state)
    identity = {"config": fields, "data": {"examples": task.fingerprint}, "arrays": arrays}
    with (Ledger(workdir) as ledger, compilation_booked(ledger),
          contextlib.closing(Checkpoints(workdir, config.checkpoint, ledger.write)) as checkpoints):
        found = checkpoints.newest_verified()
        check_mode(resume, found, workdir)
        meta: dict[str, Any] = {"validation": [], **identity}
        if found.step is None:
            state = task.begin()
        else:
            meta = checkpoints.meta(found.step)
            for name, values in identity.items():
                check_same(meta[name], values, FREE_TO_CHANGE if name == "config" else ())
            state = checkpoints.restore(found.step, task.program.abstract_state)
            print(f"continuing from step {found.step} of {workdir}", flush=True)
        ledger.begin(devices=task.mesh.size, examples=len(given.train))
        state, reason = _fit(task, state, (checkpoints, ledger, workdir), meta | identity)
        ledger.enter("evaluation")
        finished = not reason.startswith("SIG")
        metrics = task.measure(state.params) if finished else {}
        ledger.close(reason)
    return Tuned(reason, int(state.step), metrics, state.params)


def _fit(
    task: Task, state: TrainState, places: tuple[Checkpoints, Ledger, pathlib.Path],
    meta: dict[str, Any],
) -> tuple[TrainState, str]:
    """Trains with the loop of all training, which knows nothing of tasks."""
    config, (checkpoints, ledger, workdir) = task.config, places
    step = int(state.step)
    metrics = MetricsWriter(workdir, step)
    metrics.say_what_is_missing(ledger)
    progress = Progress(config.num_steps, flops_per_token=0.0, peak_flops=None)
    run = Run(
        train_step=task.train_step, batches=task.batches(step),
        evaluate=lambda state: {"loss": weighted(
            config, task.answers(state.params, config.evaluation.max_batches).losses)},
        last_step=config.num_steps)
    try:
        return fit(config.train, state, run, Records(checkpoints, metrics, progress, ledger, meta))
    finally:
        metrics.close()
