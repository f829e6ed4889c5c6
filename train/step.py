"""One training step: a pure function (state, batch) -> (state, metrics), jitted once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from batiste.sharding import constrain, laid_out
from batiste.train.config import TrainConfig
from batiste.train.objectives import causal_loss
from batiste.train.precision import adjust, all_finite, keep_if, unscale
from batiste.train.state import Program, TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    program: Program, config: TrainConfig, mesh: jax.sharding.Mesh
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Returns the jitted step; it donates the state it is given.

    The batch is a Batch of global arrays on the mesh. Metrics are float32 scalars: loss and
    cross_entropy (nats per token), tokens, gradient_norm, learning_rate; loss_scale and skipped
    when the compute dtype is float16.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        scale = None if state.loss_scale is None else state.loss_scale.scale
        dropout_key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        gradients, terms = _accumulate(program, config, state.params, batch, (dropout_key, scale))
        loss, cross_entropy, num_tokens = terms
        tokens = jnp.maximum(num_tokens, 1)
        if state.loss_scale is not None:
            gradients = unscale(gradients, state.loss_scale)
        gradients = jax.tree.map(lambda gradient: gradient / tokens, gradients)
        gradients = jax.lax.with_sharding_constraint(gradients, program.gradient_shardings)
        updates, optimizer_state = program.optimizer.update(
            gradients, _on_device(program, state.optimizer_state), state.params
        )
        metrics = {
            "loss": loss / tokens,
            "cross_entropy": cross_entropy / tokens,
            "tokens": num_tokens,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(program.schedule(state.step), jnp.float32),
        }
        new = TrainState(
            state.step + 1, optax.apply_updates(state.params, updates), optimizer_state,
            state.loss_scale,
        )
        if state.loss_scale is not None:
            new, metrics = _skip_overflow(config, state, new, (gradients, metrics))
        return new, metrics

    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))

    def on_mesh(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(mesh):
            return jitted(state, batch)

    on_mesh.jitted = jitted
    return on_mesh


def _accumulate(program: Program, config: TrainConfig, params, batch, key_and_scale):
    """Gradients of the summed loss, and the summed Terms, over `accumulation` micro-batches."""
    dropout_key, scale = key_and_scale

    def scaled_loss(params, batch, key):
        model = nnx.merge(program.graphdef, params)
        with laid_out(program.layout):
            terms = causal_loss(model, batch, key, config.objective)
        terms = jax.tree.map(jnp.sum, terms)
        return terms.loss_B if scale is None else terms.loss_B * scale, tuple(terms)

    differentiate = jax.grad(scaled_loss, has_aux=True)
    k = config.accumulation
    if k == 1:
        return differentiate(params, batch, dropout_key)

    def split(x):
        # Micro-batch i takes rows i, i + k, ...: each device keeps the rows it already has.
        x = x.reshape(x.shape[0] // k, k, *x.shape[1:]).swapaxes(0, 1)
        return jax.vmap(lambda rows: constrain(rows, "BT"))(x)

    def add(total, micro):
        batch, key = micro
        return jax.tree.map(jnp.add, total, differentiate(params, batch, key)), None

    zero = (jax.tree.map(jnp.zeros_like, params), (jnp.zeros((), jnp.float32),) * 3)
    micros = (jax.tree.map(split, batch), jax.random.split(dropout_key, k))
    return jax.lax.scan(add, zero, micros)[0]


def _on_device(program: Program, optimizer_state: Any) -> Any:
    """Fetches an offloaded state from the host; `out_shardings` send its successor back."""
    if not program.layout.offload_optimizer:
        return optimizer_state
    return jax.tree.map(
        lambda leaf, kept: jax.device_put(leaf, kept.sharding.with_memory_kind("device")),
        optimizer_state, program.abstract_state.optimizer_state,
    )


def _skip_overflow(config: TrainConfig, old: TrainState, new: TrainState, rest):
    """float16: where a gradient overflowed, keeps parameters and optimizer, halves the scale."""
    gradients, metrics = rest
    finite = all_finite(gradients)
    kept = keep_if(finite, (new.params, new.optimizer_state), (old.params, old.optimizer_state))
    metrics |= {"loss_scale": old.loss_scale.scale, "skipped": 1 - finite.astype(jnp.float32)}
    return TrainState(new.step, *kept, adjust(old.loss_scale, finite, config.loss_scale)), metrics
