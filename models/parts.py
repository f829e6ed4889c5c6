"""What names in a model's config stand for; parts of your own join these tables (docs/extend.md)."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Activation(NamedTuple):
    """A nonlinearity of float32 arrays; gated: applied to a gate, which multiplies the units."""

    apply: Callable[[jax.Array], jax.Array]
    gated: bool = False


class Turn(NamedTuple):
    """A position scheme that acts on queries and keys before they meet.

    of_places: (config, positions_BT) -> arrays, once for all layers. apply: (x_BTNH, arrays) -> a
    query's or key's x_BTNH.
    """

    of_places: Callable
    apply: Callable


def _tanh_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _exact_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _root_mean_square(y: jax.Array, epsilon: float) -> jax.Array:
    return y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + epsilon)


def _layer(y: jax.Array, epsilon: float) -> jax.Array:
    return _root_mean_square(y - y.mean(axis=-1, keepdims=True), epsilon)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(jax.nn.relu),
    "relu2": Activation(lambda x: jnp.square(jax.nn.relu(x))),
    "gelu": Activation(_tanh_gelu),
    "gelu_exact": Activation(_exact_gelu),
    "silu": Activation(jax.nn.silu),
    "swiglu": Activation(jax.nn.silu, gated=True),
    "geglu": Activation(_tanh_gelu, gated=True),
}
# (float32 x, epsilon) -> normalized over the last dim, before the scale.
NORMS: dict[str, Callable] = {
    "rms": _root_mean_square, "rms_plus_one": _root_mean_square, "layer": _layer,
}
TURNS: dict[str, Turn] = {}  # Besides "rope", which layers of different kinds may do differently.
# (the mask of global layers, config) -> the mask of this kind.
LAYER_KINDS: dict[str, Callable] = {
    "global": lambda mask, config: mask,
    "local": lambda mask, config: dataclasses.replace(mask, window=config.window),
}
MIXERS: dict[str, type] = {}  # Besides "attention": modules that are called as it is.
