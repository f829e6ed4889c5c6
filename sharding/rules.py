"""One table from letters to mesh axes; every sharding in the repository derives from it."""

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
