"""One training step: a pure function (state, batch) -> (state, metrics), jitted once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from batiste.models import rebalanced
from batiste.sharding import HOST_MEMORY, compiler_options, constrain, layer_order
from batiste.train.config import TrainConfig
from batiste.train.faults import (
    faulty_gradients, faulty_params, faulty_state, faulty_updates, parse_fault,
)
from batiste.train.gradients import accumulate
from batiste.train.health import parse_policies
from batiste.train.health_statistics import health_statistics
from batiste.train.local_steps import Workers, exchanged_bytes, make_exchange
from batiste.train.objectives import RouterTerms
from batiste.train.precision import adjust, all_finite, keep_if, unscale
from batiste.train.replaced import detection_metrics
from batiste.train.slices import all_reduce_bytes, in_each_slice, summed_bytes, summed_once
from batiste.train.state import Program, TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    program: Program, config: TrainConfig, mesh: jax.sharding.Mesh
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Returns the jitted step (state, batch, factor); it donates the state it is given.

    The batch is a Batch of global arrays on the mesh. Metrics are float32 scalars: loss and
    cross_entropy (nats per token), tokens (that count in the loss), real_tokens (that are no
    padding), gradient_norm, learning_rate; loss_scale and skipped when the compute dtype is float16; those of `detection_metrics` of a discriminator, where
    cross_entropy is its generator's; router_balance (1 is even), router_z, router_load (of the
    busiest expert, over the mean) with experts; slice_bytes, what a device sends to other slices,
    when there are several. In local steps all but the last are arrays over slices, of each slice's
    own rows. Where the config measures health there are HealthStatistics, too; and `skipped`, where
    gradients that are not finite are not to be taken. factor: a float32 scalar on the mesh that
    multiplies the learning rate; None is 1.
    """
    local = config.local.steps is not None
    step = _local_step(program, config, mesh) if local else _common_step(program, config, mesh)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    jitted = jax.jit(
        lambda state, batch, factor=None: step(_on_device(program, state), batch, factor),
        donate_argnums=0,
        out_shardings=(state_shardings, None),
        compiler_options=compiler_options(mesh.devices.flat[0], program.letters),
    )

    def on_mesh(
        state: TrainState, batch: Any, factor: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(mesh):
            return jitted(state, batch, factor)

    on_mesh.jitted = jitted
    return on_mesh


def _common_step(program: Program, config: TrainConfig, mesh: jax.sharding.Mesh) -> Callable:
    """A step that all devices take together, by the gradients of the whole batch."""
    gradients_of = functools.partial(accumulate, program, config)
    slices = mesh.shape["slice"]
    axes = _summed_once_over(program, config, mesh)
    if axes:
        gradients_of = summed_once(gradients_of, program.letters, axes)
    if slices > 1:
        gradient_bytes = summed_bytes(mesh, program.letters, program.abstract_state.params)

    def step(state: TrainState, batch: Any, factor: Any) -> tuple[TrainState, Metrics]:
        scale = None if state.loss_scale is None else state.loss_scale.scale
        fault, places = parse_fault(config.faults), _places(program)
        params = faulty_params(fault, state.params, state.step + 1, places)
        gradients, terms = gradients_of(params, batch, state.step, scale)
        gradients = faulty_gradients(fault, gradients, state.step + 1, places)
        new, metrics = _update(program, config, state, gradients, (terms, factor))
        new = new._replace(params=faulty_state(
            fault, new.params, state.step + 1, program.abstract_state.params))
        if slices > 1:
            sums = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(terms))
            metrics["slice_bytes"] = jnp.float32(gradient_bytes + all_reduce_bytes(slices, sums))
        return new, metrics

    return step


def _summed_once_over(
    program: Program, config: TrainConfig, mesh: jax.sharding.Mesh
) -> tuple[str, ...]:
    """The axes over which gradients are summed at the end of a step and not as they come.

    `data` where a step has several sums to make, and every device holds whole gradients anyway:
    ZeRO-2 and 3 sum each layer's as it comes because there is no room for all.
    """
    layout, data = program.layout, mesh.shape["data"]
    several = config.accumulation * layout.micro_batches > 1
    names, leaves = jax.tree.leaves(program.letters), jax.tree.leaves(program.abstract_state.params)
    divides = all(
        leaf.shape[name.index("D")] % data == 0
        for name, leaf in zip(names, leaves, strict=True) if "D" in name
    )
    wanted = {"slice": True, "data": layout.zero < 2 and several and divides}
    return tuple(axis for axis, sums in wanted.items() if sums and mesh.shape[axis] > 1)


def _local_step(program: Program, config: TrainConfig, mesh: jax.sharding.Mesh) -> Callable:
    """A step that each slice takes by itself, with its own rows; an exchange where it is due."""
    exchange = make_exchange(config.local, program.letters, program.layout.zero)
    whole = program.abstract_state
    places = jax.tree.map(
        lambda leaf: leaf.sharding,
        (whole.params, whole.optimizer_state, whole.workers.params, whole.workers.residual),
    )
    num_bytes = exchanged_bytes(config.local, mesh, program.letters, whole.params)

    def of_this_slice(step: jax.Array, workers: Workers, batch: Any) -> tuple[Workers, Metrics]:
        own = jax.tree.map(lambda leaf: leaf[0], workers)
        state = TrainState(step, own.params, own.optimizer_state, own.loss_scale)
        scale = None if own.loss_scale is None else own.loss_scale.scale
        gradients, terms = accumulate(program, config, own.params, batch, step, scale)
        state, metrics = _update(program, config, state, gradients, (terms, None))
        metrics["real_tokens"] *= mesh.shape["slice"]  # The mean over slices is of them all.
        own = Workers(state.params, state.optimizer_state, state.loss_scale, own.residual)
        return jax.tree.map(lambda leaf: leaf[None], (own, metrics))

    def step(state: TrainState, batch: Any, _: None) -> tuple[TrainState, Metrics]:
        own = PartitionSpec("slice")
        train = in_each_slice(of_this_slice, (PartitionSpec(), own, own), own)
        workers, metrics = train(state.step, state.workers, batch)
        done = state.step + 1
        due = (done % config.local.steps == 0) | (done == config.num_steps)
        exchanged = state.params, state.optimizer_state, workers.params, workers.residual
        # Said on both sides of the condition: otherwise the shares that an exchange works on spread
        # into the steps, and weights are gathered in every layer.
        exchanged = jax.lax.with_sharding_constraint(exchanged, places)
        exchanged = jax.lax.cond(due, exchange, lambda *same: same, *exchanged)
        params, outer_state, own_params, residual = jax.lax.with_sharding_constraint(
            exchanged, places)
        workers = workers._replace(params=own_params, residual=residual)
        metrics["slice_bytes"] = jnp.where(due, jnp.float32(num_bytes), 0)
        return TrainState(done, params, outer_state, None, workers), metrics

    return step


def _update(
    program: Program, config: TrainConfig, state: TrainState, gradients: Any, rest: tuple
) -> tuple[TrainState, Metrics]:
    """The state after an optimizer step by summed gradients, and what it measured.

    rest: the summed Terms, and what multiplies the learning rate, or None.
    """
    terms, factor = rest
    tokens = jnp.maximum(terms.tokens_B, 1)
    if state.loss_scale is not None:
        gradients = unscale(gradients, state.loss_scale)
    gradients = jax.tree.map(
        lambda gradient, letters: constrain(
            gradient / tokens, letters, zero=program.layout.zero >= 1),
        gradients, program.letters,
    )
    updates, optimizer_state = program.optimizer.update(
        gradients, state.optimizer_state, state.params, step=state.step
    )
    updates = faulty_updates(
        parse_fault(config.faults), updates, state.step + 1, _places(program))
    metrics = {
        "loss": terms.loss / tokens,
        "cross_entropy": terms.cross_entropy_B / tokens,
        "tokens": terms.tokens_B,
        "real_tokens": terms.real_B,
        "gradient_norm": optax.tree.norm(gradients),
        "learning_rate": jnp.asarray(program.schedule(state.step), jnp.float32),
    }
    if factor is not None:
        metrics["learning_rate"] *= factor
        updates = jax.tree.map(lambda update: update * factor, updates)
    if config.measures:
        trees = gradients, state.params, updates
        metrics["health"] = health_statistics(program, terms, trees)
    params = optax.apply_updates(state.params, updates)
    if terms.router is not None:
        load_LE = terms.router.load_BLE  # Of all rows together.
        params = rebalanced(params, load_LE, config.optimizer.router_bias_rate)
        metrics |= _router_metrics(terms.router, tokens)
    if terms.replaced is not None:
        metrics |= detection_metrics(terms.replaced)
    new = TrainState(state.step + 1, params, optimizer_state, state.loss_scale)
    if state.loss_scale is not None:
        new, metrics = _skip_overflow(config, state, new, (gradients, metrics))
    elif config.measures and parse_policies(config.health.policies)["not_finite"] == "skip":
        finite = jnp.isfinite(metrics["gradient_norm"])
        kept = keep_if(finite, (new.params, new.optimizer_state), (state.params, state.optimizer_state))
        new = TrainState(new.step, *kept, None)
        metrics["skipped"] = 1 - finite.astype(jnp.float32)
    return new, metrics


def _places(program: Program) -> np.ndarray:
    """Where the layer of each depth is stored."""
    layers, layout = jax.tree.leaves(program.abstract_state.params["layers"]), program.layout
    return np.argsort(layer_order(layers[0].shape[0], layout.stage, layout.interleave))


def _on_device(program: Program, state: TrainState) -> TrainState:
    """Fetches what is offloaded from the host; `out_shardings` send its successor back."""
    def fetch(leaf: jax.Array, kept: jax.ShapeDtypeStruct) -> jax.Array:
        if kept.sharding.memory_kind != HOST_MEMORY:
            return leaf
        return jax.device_put(leaf, kept.sharding.with_memory_kind("device"))

    return jax.tree.map(fetch, state, program.abstract_state)


def _router_metrics(router: RouterTerms, tokens: jax.Array) -> Metrics:
    """Means over tokens and layers, and the worst over layers; of terms summed over rows."""
    load_LE = router.load_BLE
    return {
        "router_balance": router.balance_B / (tokens * len(load_LE)),
        "router_z": router.z_B / (tokens * len(load_LE)),
        "router_load": (load_LE.max(axis=1) / jnp.maximum(load_LE.mean(axis=1), 1)).max(),
    }


def _skip_overflow(config: TrainConfig, old: TrainState, new: TrainState, rest):
    """float16: where a gradient overflowed, keeps parameters and optimizer, halves the scale."""
    gradients, metrics = rest
    finite = all_finite(gradients)
    kept = keep_if(finite, (new.params, new.optimizer_state), (old.params, old.optimizer_state))
    metrics |= {"loss_scale": old.loss_scale.scale, "skipped": 1 - finite.astype(jnp.float32)}
    return TrainState(new.step, *kept, adjust(old.loss_scale, finite, config.loss_scale)), metrics
