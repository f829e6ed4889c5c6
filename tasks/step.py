"""A step of a task: the gradients of weighted heads, by micro-batches, and the update."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from batiste.sharding import constrain, laid_out
from batiste.tasks.config import TaskConfig
from batiste.tasks.losses import counts_of, loss_sums
from batiste.tasks.rows import TaskBatch
from batiste.train import Program, TrainState

ClassWeights = dict[str, tuple[float, ...] | None]


def make_task_step(
    program: Program, config: TaskConfig, class_weights: ClassWeights, mesh: jax.sharding.Mesh
) -> Callable[[TrainState, TaskBatch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted (state, batch) -> (state, metrics); it donates the state.

    The loss is sum over heads of weight * (sum of losses / labelled): the labelled are counted in
    the whole batch, so that micro-batches add up to it. Metrics are float32 scalars: loss, that of
    each head as loss_NAME, gradient_norm, learning_rate.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)

    def step(state: TrainState, batch: TaskBatch):
        gradients, losses = _gradients(program, config, class_weights, state, batch)
        gradients = jax.tree.map(
            lambda gradient, letters: constrain(
                gradient, letters, zero=program.layout.zero >= 1),
            gradients, program.letters)
        updates, optimizer_state = program.optimizer.update(
            gradients, state.optimizer_state, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)
        metrics = {f"loss_{name}": loss for name, loss in losses.items()} | {
            "loss": weighted(config, losses),
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": program.schedule(state.step),
            "real_tokens": sum((rows.segments_BT != 0).sum(dtype=jnp.float32)
                               for rows in (batch.rows, batch.second) if rows is not None),
        }
        return TrainState(state.step + 1, params, optimizer_state, None), metrics

    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))

    def on_mesh(state: TrainState, batch: TaskBatch):
        with jax.set_mesh(mesh):
            return jitted(state, batch)

    on_mesh.jitted = jitted
    return on_mesh


def weighted(config: TaskConfig, losses: dict[str, Any]) -> Any:
    """The loss of all heads together."""
    return sum(head.weight * losses[head.name] for head in config.heads)


def _gradients(
    program: Program, config: TaskConfig, class_weights: ClassWeights, state: TrainState,
    batch: TaskBatch,
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradients of the loss of a whole batch, and each head's loss."""
    counts = {name: jnp.maximum(count, 1) for name, count in counts_of(batch).items()}

    def loss(params, micro, key):
        model = nnx.merge(program.graphdef, params)
        with laid_out(program.layout):
            sums = loss_sums(config.heads, class_weights, model(micro, key), micro)
        losses = {name: total / counts[name] for name, total in sums.items()}
        return weighted(config, losses), losses

    differentiate, k = jax.grad(loss, has_aux=True), config.accumulation
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    if k == 1:
        return differentiate(state.params, batch, key)

    def split(x):
        # Micro-batch i takes rows i, i + k, ...: each device keeps the rows it already has.
        x = x.reshape(x.shape[0] // k, k, *x.shape[1:]).swapaxes(0, 1)
        return jax.vmap(lambda rows: constrain(rows, "BSD"[: rows.ndim]))(x)

    def add(total, micro):
        return jax.tree.map(jnp.add, total, differentiate(state.params, *micro)), None

    micros = (jax.tree.map(split, batch), jax.random.split(key, k))
    shapes = jax.eval_shape(differentiate, state.params, *jax.tree.map(lambda x: x[0], micros))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zero, micros)[0]


class Answers(NamedTuple):
    """What a model says of examples: by head what `TaskModel` returns, and each head's loss."""

    said: dict[str, Any]
    losses: dict[str, float]


def make_answers(
    program: Program, config: TaskConfig, class_weights: ClassWeights, mesh: jax.sharding.Mesh
) -> Callable[[Any, TaskBatch], tuple[dict, dict, dict]]:
    """The jitted (params, batch) -> (said, sums of losses, labelled), whole in every process."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def answers(params, batch):
        model = nnx.merge(program.graphdef, params)
        with laid_out(program.layout):
            said = model(batch)
            return said, loss_sums(config.heads, class_weights, said, batch), counts_of(batch)

    jitted = jax.jit(answers, out_shardings=whole)

    def on_mesh(params, batch):
        with jax.set_mesh(mesh):
            return jitted(params, batch)

    return on_mesh


def joined(config: TaskConfig, parts: Sequence[tuple[dict, dict, dict]], count: int) -> Answers:
    """The answers to `count` examples, of batches in a row; what fills the last is left out."""
    said = {head.name: np.concatenate([part[0][head.name] for part in parts])[:count]
            for head in config.heads}
    losses = {
        head.name: float(sum(part[1][head.name] for part in parts)
                         / max(1.0, sum(float(part[2][head.name]) for part in parts)))
        for head in config.heads}
    return Answers(said, losses)
