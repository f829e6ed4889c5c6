"""Gradients of a batch, summed over its micro-batches."""

import jax
import jax.numpy as jnp
from flax import nnx

from batiste.sharding import constrain, laid_out
from batiste.train.config import TrainConfig
from batiste.train.health_terms import health_terms, joined
from batiste.train.objectives import batch_loss
from batiste.train.state import Program


def accumulate(program: Program, config: TrainConfig, params, batch, step, scale):
    """Gradients of the summed loss, and the summed Terms, over `accumulation` micro-batches.

    step: int32, the seed of dropout. scale: float16's loss scale, or None.
    """
    dropout_key = _dropout_key(config, step)

    def scaled_loss(params, batch, key):
        model = nnx.merge(program.graphdef, params)
        with laid_out(program.layout):
            terms = batch_loss(
                model, batch, key, config.objective, scale, config.measures)
        health = health_terms(terms, batch) if config.measures else None
        terms = terms._replace(layers=None).of_all_rows()._replace(health=health)
        return terms.loss if scale is None else terms.loss * scale, terms

    differentiate = jax.grad(scaled_loss, has_aux=True)
    k = config.accumulation
    if k == 1:
        return differentiate(params, batch, dropout_key)

    def split(x):
        # Micro-batch i takes rows i, i + k, ...: each device keeps the rows it already has.
        x = x.reshape(x.shape[0] // k, k, *x.shape[1:]).swapaxes(0, 1)
        return jax.vmap(lambda rows: constrain(rows, "BS"[: rows.ndim]))(x)

    def add(total, micro):
        batch, key = micro
        gradients, terms = differentiate(params, batch, key)
        found = gradients, terms._replace(health=None)
        return jax.tree.map(jnp.add, total, found), terms.health

    micros = (jax.tree.map(split, batch), jax.random.split(dropout_key, k))
    gradients, terms = jax.eval_shape(
        differentiate, params, *jax.tree.map(lambda x: x[0], micros))
    zero = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (gradients, terms._replace(health=None)))
    (gradients, terms), health = jax.lax.scan(add, zero, micros)
    return gradients, terms._replace(health=joined(health) if config.measures else None)


def _dropout_key(config: TrainConfig, step: jax.Array) -> jax.Array:
    """The key of a step; where slices compute by themselves, no two drop the same entries."""
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    for axis in ("slice", "data"):
        if axis in manual:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key
