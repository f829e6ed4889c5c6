"""DiLoCo: slices train alone for a while, then agree by an outer optimizer on what they found.

Every `steps` steps the way that each slice has gone, anchor minus own parameters, is averaged over
the slices and taken for a gradient of the anchor; all continue from the new anchor. In between,
nothing travels between slices. What is exchanged may be compressed; what compression lost is
remembered and added to the next exchange (error feedback).

Sources: Douillard et al. 2023 (arXiv:2311.08105), algorithm 1; error feedback: Karimireddy et al.
2019 (arXiv:1901.09847).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from batiste.fields import Config, check_types
from batiste.sharding import constrain, per_device, spec
from batiste.train.compression import COMPRESSIONS, decode, encode
from batiste.train.precision import LossScale
from batiste.train.schedule import check_choice
from batiste.train.slices import all_gather_bytes, share, split_over_data, summed_bytes


@dataclasses.dataclass
class LocalStepsConfig(Config):
    """How slices take steps of their own; steps None: they sum gradients in every step instead.

    steps: between exchanges; step train.num_steps exchanges too. Evaluation, generation and a run
    that stops early see what the slices last agreed on. outer_learning_rate, outer_momentum:
    of the outer optimizer, SGD with Nesterov's momentum. compression: of what is exchanged
    (train/compression.py). kept_fraction: of the entries, by top_k.
    """

    steps: int | None = None
    outer_learning_rate: float = 0.7
    outer_momentum: float = 0.9
    compression: str = "none"
    kept_fraction: float = 0.01

    def validate(self) -> None:
        """Raises ValueError, naming the field, if a field is out of its range."""
        check_types(self, "train.local.")
        check_choice("train.local.compression", self.compression, COMPRESSIONS)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"train.local.steps: expected >= 1 or None, got {self.steps}")
        if self.steps is None and self.compression != "none":
            raise ValueError(
                f"train.local.compression={self.compression!r} is of exchanges between local "
                "steps: set train.local.steps, or train.local.compression='none'"
            )
        if not self.outer_learning_rate > 0:
            raise ValueError(
                f"train.local.outer_learning_rate: expected > 0, got {self.outer_learning_rate}")
        if not 0 <= self.outer_momentum < 1:
            raise ValueError(
                f"train.local.outer_momentum: expected in [0, 1), got {self.outer_momentum}")
        if not 0 < self.kept_fraction <= 1:
            raise ValueError(
                f"train.local.kept_fraction: expected in (0, 1], got {self.kept_fraction}")


class Workers(NamedTuple):
    """What each slice has for itself; every array has a leading dim of slices.

    residual: what compression has lost so far, in the shapes of params; None without compression.
    """

    params: Any
    optimizer_state: Any
    loss_scale: LossScale | None
    residual: Any


def outer_optimizer(config: LocalStepsConfig) -> optax.GradientTransformation:
    """SGD with Nesterov's momentum, as DiLoCo found best."""
    return optax.sgd(config.outer_learning_rate, config.outer_momentum, nesterov=True)


def make_exchange(config: LocalStepsConfig, letters: Any, zero: int) -> Callable:
    """(anchor, outer state, own parameters, residuals) -> the same after an exchange.

    Inside a slice every device of `data` works on its share alone.
    """
    outer = outer_optimizer(config)

    def exchange(anchor: Any, outer_state: Any, own: Any, residual: Any) -> tuple:
        way, residual = _mean_way(config, letters, (anchor, own, residual))
        updates, outer_state = outer.update(way, outer_state)
        anchor = split_over_data(
            optax.apply_updates(split_over_data(anchor, letters), updates), letters)
        anchor = jax.tree.map(
            lambda leaf, name: constrain(leaf, name, zero=zero >= 3), anchor, letters)
        own = jax.tree.map(lambda leaf, own: jnp.broadcast_to(leaf[None], own.shape), anchor, own)
        return anchor, outer_state, own, residual

    return exchange


def _mean_way(config: LocalStepsConfig, letters: Any, arrays: tuple) -> tuple[Any, Any]:
    """The mean over slices of anchor minus own parameters, as received; the new residuals."""
    def of_this_device(anchor, own, residual):
        ways = jax.tree.map(lambda anchor, own: anchor - own[0], anchor, own)
        if residual is None:
            return jax.lax.pmean(ways, "slice"), None
        ways = jax.tree.map(lambda way, lost: way + lost[0], ways, residual)
        pairs = jax.tree.map(lambda way, name: _send(config, way, name), ways, letters)
        structure = jax.tree.structure(letters)
        means, received = jax.tree.transpose(structure, jax.tree.structure((0, 0)), pairs)
        return means, jax.tree.map(lambda way, got: (way - got)[None], ways, received)

    shared = jax.tree.map(lambda name: spec(name, zero=True), letters)
    own = jax.tree.map(lambda name: spec(name, zero=True, each_slice=True), letters)
    residual = None if arrays[2] is None else own
    return per_device(of_this_device, (shared, own, residual), (shared, residual))(*arrays)


def _send(config: LocalStepsConfig, way: jax.Array, letters: str) -> tuple[jax.Array, jax.Array]:
    """The mean over slices of what all received, and what they received from this one."""
    x = way.reshape(_rows(letters, way.shape))

    def received(sent):
        return decode(sent, x.shape, config.compression)

    sent = encode(x, config.compression, config.kept_fraction)
    # Every slice adds in the same order, so that all have the same anchor to the last bit.
    total, _ = jax.lax.scan(
        lambda total, sent: (total + received(sent), None), jnp.zeros_like(x),
        jax.lax.all_gather(sent, "slice"),
    )
    mean = total / jax.lax.axis_size("slice")
    return mean.reshape(way.shape), received(sent).reshape(way.shape)


def _rows(letters: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """What is compressed by itself: a layer of a stack, or else the whole parameter."""
    rows = shape[0] if letters[:1] == "L" else 1
    return rows, math.prod(shape) // rows


def exchanged_bytes(config: LocalStepsConfig, mesh: Mesh, letters: Any, params: Any) -> float:
    """Bytes that a device sends to other slices in an exchange."""
    if config.compression == "none":
        return summed_bytes(mesh, letters, params)
    size = 0
    for name, leaf in zip(jax.tree.leaves(letters), jax.tree.leaves(params), strict=True):
        sent = jax.eval_shape(
            lambda x: encode(x, config.compression, config.kept_fraction),
            jax.ShapeDtypeStruct(_rows(name, share(mesh, name, leaf.shape)), jnp.float32),
        )
        size += sum(array.size * array.dtype.itemsize for array in sent)
    return all_gather_bytes(mesh.shape["slice"], size)
