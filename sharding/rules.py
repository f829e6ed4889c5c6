"""One table from letters to mesh axes; every sharding in the repository derives from it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from batiste.sharding.alphabet import check_letters
from batiste.sharding.layout import layout

# A letter that is absent is replicated. D is split only in what ZeRO shards (ZERO_RULE): in an
# activation it stays whole, because the batch already occupies the data axis. The vocabulary is
# split over the stages too, so that embedding and head are every stage's share of work and memory
# and no stage waits for another's. Outside the experts, `expert` is one more axis of the batch.
RULES = {
    "B": ("slice", "data", "expert"),
    "T": "context",
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "V": ("stage", "tensor"),
    "L": "stage",
    "E": "expert",
}
ZERO_RULE = {"D": "data"}
# Between blocks, where no head or feed-forward dim needs `tensor`, it splits time (sequence
# parallelism, Korthikanti et al. 2022, arXiv:2205.05198).
BETWEEN_BLOCKS_RULE = {"T": ("context", "tensor")}
HOST_MEMORY = "pinned_host"


def spec(
    letters: str, *, zero: bool = False, between_blocks: bool = False, each_slice: bool = False
) -> PartitionSpec:
    """The PartitionSpec of an array with these letters.

    zero: also split over `data`, as ZeRO does with what it shards. between_blocks: of the residual
    stream. each_slice: of arrays that every slice has one of, stacked in a leading dim that has no
    letter. Raises ValueError when two letters want the same mesh axis.
    """
    rules = RULES | (ZERO_RULE if zero else {}) | (BETWEEN_BLOCKS_RULE if between_blocks else {})
    axes = tuple(rules.get(letter) for letter in check_letters(letters))
    axes = ("slice", *axes) if each_slice else axes
    flat = [name for axis in axes if axis for name in ([axis] if isinstance(axis, str) else axis)]
    if len(flat) != len(set(flat)):
        raise ValueError(f"letters {letters!r}: two dims want the same mesh axis, got {axes}")
    return PartitionSpec(*axes)


def constrain(
    x: jax.Array, letters: str, *, zero: bool = False, between_blocks: bool = False
) -> jax.Array:
    """Pins an array to its sharding on the ambient mesh; without a mesh, changes nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return _constrain(x, spec(letters, zero=zero, between_blocks=between_blocks))


def _constrain(x: jax.Array, partition: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, _automatic(partition))


def _automatic(partition: PartitionSpec) -> PartitionSpec:
    """Without the axes that an enclosing shard_map has already split over (slice, stage)."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    kept = [
        tuple(name for name in ((axes,) if isinstance(axes, str) else axes or ()) if name not in manual)
        for axes in partition
    ]
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in kept))


def axes_of(letters: str) -> tuple[str, ...]:
    """The mesh axes that split these letters and are not yet split over; without a mesh, none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    named = ((axes,) if isinstance(axes, str) else axes or () for axes in _automatic(spec(letters)))
    return tuple(name for names in named for name in names if mesh.shape[name] > 1)


def per_device(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` called by each device with its own share; without a mesh, `function` itself.

    The specs are PartitionSpecs as `spec` makes them; axes that are already split are left out.
    Which axes an output varies over is not checked: the kernels' outputs do not carry it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    in_specs, out_specs = jax.tree.map(
        _automatic, (in_specs, out_specs), is_leaf=lambda node: isinstance(node, PartitionSpec)
    )
    axes = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False
    )


def gather(weight: jax.Array, letters: str) -> jax.Array:
    """A weight made whole over `data` where it is used; its gradient is left as ZeRO wants it.

    Said here and not left to the compiler, which otherwise may move activations instead of weights:
    without it an embedding lookup under ZeRO-3 became an all-to-all.
    """
    if jax.sharding.get_abstract_mesh().empty or layout().zero < 2:
        return weight
    return _gather(weight, letters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(weight: jax.Array, letters: str) -> jax.Array:
    return _constrain(weight, spec(letters))


def _scatter(letters: str, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Reduced first, then split: the TPU compiler fuses the two into a reduce-scatter. Asked for the
    # split alone, it may move activations instead (an all-to-all for the embedding).
    whole = _constrain(gradient, spec(letters))
    return (_constrain(whole, spec(letters, zero=True)),)


_gather.defvjp(lambda weight, letters: (_gather(weight, letters), None), _scatter)


def shardings(
    mesh: Mesh, letters_tree: Any, *, zero: bool = False, each_slice: bool = False
) -> Any:
    """A tree of NamedSharding for a tree whose leaves are letters; options as in `spec`."""
    return jax.tree.map(
        lambda letters: NamedSharding(mesh, spec(letters, zero=zero, each_slice=each_slice)),
        letters_tree,
    )


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
