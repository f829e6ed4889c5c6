"""A parameter: its letters, its initializer and its dtype, declared in one place."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from batiste.sharding import check_letters, gather


def matrix(
    rngs: nnx.Rngs,
    letters: str,
    sizes: dict[str, int],
    *,
    inputs: str,
    stddev: float | None,
    gain: float = 1.0,
) -> nnx.Param:
    """A weight drawn from a normal, float32; `inputs` are the letters that a product sums over.

    stddev: None means 1 / sqrt(product of the input sizes). gain multiplies either.
    """
    if stddev is None:
        stddev = math.prod(sizes[letter] for letter in inputs) ** -0.5
    shape = tuple(sizes[letter] for letter in check_letters(letters))
    value = gain * stddev * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, letters=letters)


def vector(letters: str, sizes: dict[str, int], value: float) -> nnx.Param:
    """A norm scale or a bias: constant at the start, float32."""
    shape = tuple(sizes[letter] for letter in check_letters(letters))
    return nnx.Param(jnp.full(shape, value, jnp.float32), letters=letters)


def gathered(params: nnx.State) -> nnx.State:
    """The same parameters, each whole over `data` for the use that follows (see sharding.gather)."""
    return jax.tree.map(
        lambda param: param.replace(gather(param.get_value(), param.get_metadata("letters"))),
        params,
        is_leaf=lambda node: isinstance(node, nnx.Param),
    )


def letters_tree(params: nnx.State) -> dict[str, Any]:
    """The letters of every parameter, in the structure of `nnx.to_pure_dict(params)`.

    A stack of layers has one dim more than the layer declared, and gets a leading L.
    """

    def letters(param: nnx.Param) -> str:
        declared = param.get_metadata("letters")
        return "L" * (param.get_value().ndim - len(declared)) + declared

    leaves = jax.tree.map(letters, params, is_leaf=lambda node: isinstance(node, nnx.Param))
    return nnx.to_pure_dict(leaves)
