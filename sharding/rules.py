"""One table from letters to mesh axes; every sharding in the repository derives from it."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from batiste.sharding.alphabet import check_letters

# A letter that is absent is replicated. D is split only in what ZeRO shards (ZERO_RULE): in an
# activation it stays whole, because the batch already occupies the data axis.
RULES = {
    "B": ("slice", "data"),
    "T": "context",
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "V": "tensor",
    "L": "stage",
    "E": "expert",
}
ZERO_RULE = {"D": "data"}
_zero = contextvars.ContextVar("zero", default=0)


def spec(letters: str, *, zero: bool = False) -> PartitionSpec:
    """The PartitionSpec of an array with these letters.

    zero: also split over `data`, as ZeRO does with what it shards.
    Raises ValueError when two letters want the same mesh axis.
    """
    rules = {**RULES, **ZERO_RULE} if zero else RULES
    axes = tuple(rules.get(letter) for letter in check_letters(letters))
    flat = [name for axis in axes if axis for name in ([axis] if isinstance(axis, str) else axis)]
    if len(flat) != len(set(flat)):
        raise ValueError(f"letters {letters!r}: two dims want the same mesh axis, got {axes}")
    return PartitionSpec(*axes)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Pins an activation to its sharding on the ambient mesh; without a mesh, changes nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(letters))


@contextlib.contextmanager
def zero_level(zero: int) -> Iterator[None]:
    """Says, while a step is traced, what of the weights is split over `data` (see MeshConfig)."""
    token = _zero.set(zero)
    try:
        yield
    finally:
        _zero.reset(token)


def gather(weight: jax.Array, letters: str) -> jax.Array:
    """A weight made whole over `data` where it is used; its gradient is left as ZeRO wants it.

    Said here and not left to the compiler, which otherwise may move activations instead of weights:
    without it an embedding lookup under ZeRO-3 became an all-to-all.
    """
    if jax.sharding.get_abstract_mesh().empty or _zero.get() < 2:
        return weight
    return _gather(weight, letters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(weight: jax.Array, letters: str) -> jax.Array:
    return jax.lax.with_sharding_constraint(weight, spec(letters))


def _scatter(letters: str, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Reduced first, then split: the TPU compiler fuses the two into a reduce-scatter. Asked for the
    # split alone, it may move activations instead (an all-to-all for the embedding).
    whole = jax.lax.with_sharding_constraint(gradient, spec(letters))
    return (jax.lax.with_sharding_constraint(whole, spec(letters, zero=True)),)


_gather.defvjp(lambda weight, letters: (_gather(weight, letters), None), _scatter)


def shardings(mesh: Mesh, letters_tree: Any, *, zero: bool = False) -> Any:
    """A tree of NamedSharding for a tree whose leaves are letters."""
    return jax.tree.map(lambda letters: NamedSharding(mesh, spec(letters, zero=zero)), letters_tree)


def check_divisible(mesh: Mesh, letters: str, shape: tuple[int, ...], *, zero: bool) -> None:
    """Raises ValueError, naming the dim, when a mesh axis does not divide a dim that it splits."""
    for letter, size, axis in zip(letters, shape, spec(letters, zero=zero), strict=True):
        names = () if axis is None else (axis,) if isinstance(axis, str) else axis
        parts = 1
        for name in names:
            parts *= mesh.shape[name]
        if size % parts:
            raise ValueError(
                f"dim {letter} of size {size} (letters {letters}) is not divisible by mesh."
                f"{'*'.join(names)}={parts}: choose a mesh size that divides {size}"
            )
