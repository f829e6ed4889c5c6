"""The layers over pipeline stages: micro-batches flow through them in a ring."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from batiste.sharding import constrain, layer_order, layout

# The name under which a layer's input may be kept for the backward pass.
LAYER_INPUT = "layer_input"
# Primitives whose results a chunk does again (see `_policy`).
MOVES = ("slice", "dynamic_slice", "squeeze", "reshape", "sharding_constraint")


class Schedule(NamedTuple):
    """Who works on what when: GPipe, and with several rounds the circular schedule.

    A stage's layers come in `rounds` chunks. A micro-batch passes all stages once a round and
    returns to the first stage one tick after it left the last. Each stage starts a tick after the
    one before, and is then busy at every tick: first with as many micro-batches as there are
    stages for all rounds, then with the next ones. A stage waits stages - 1 of all ticks. Its
    weights' gradients are summed over the rows that the mesh splits once a tick.
    """

    stages: int
    rounds: int
    micro_batches: int

    @property
    def items(self) -> int:
        """Chunks of work that each stage does."""
        return self.rounds * self.micro_batches

    @property
    def ticks(self) -> int:
        """How long it takes, in chunks of work."""
        return self.items + self.stages - 1

    @property
    def width(self) -> int:
        """Micro-batches that go around together."""
        return self.stages if self.rounds > 1 else self.micro_batches

    def place(self, item: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Round and micro-batch of a stage's work item, counted from its first."""
        group, within = jnp.divmod(item, self.width * self.rounds)
        turn, lane = jnp.divmod(within, self.width)
        return turn, group * self.width + lane


class Layers(NamedTuple):
    """What each layer has of its own, with leading L; without it, that of one layer.

    kinds: int32, which mask; None where a pattern says it. keys: for dropout, or None.
    """

    weights: Any
    keys: jax.Array | None = None
    cache: Any = None
    kinds: jax.Array | None = None


def pipelined(
    run: Callable,
    kinds: Sequence[str],
    policy: Callable | None,
    x_BTD: jax.Array,
    rows: Any,
    layers: Layers,
) -> tuple[jax.Array, Any]:
    """x_BTD after all layers, and their results; each stage of the ambient mesh runs its own.

    run(pattern, rows, x_BTD, layers) -> (x_BTD, results): some layers, one after another. `pattern`
    repeats over them; where it is (None,), `layers.kinds` says each layer's.
    kinds: of each layer. policy: the one of jax.checkpoint that `run` has, if any.
    rows: what `run` needs of each row besides x_BTD, a tree of arrays BT.
    layers: weights as they are stored, in the order of `layer_order`; keys by depth, of which each
    micro-batch gets its own unless it is the only one. Results have leading L in the order of the
    weights: fields named ..._B... have all rows, others are sums over the micro-batches.
    """
    mesh = layout()
    schedule = Schedule(mesh.stage, mesh.interleave, mesh.micro_batches)
    order = layer_order(len(kinds), mesh.stage, mesh.interleave)
    pattern, kinds_L = _pattern(kinds, order, schedule)
    keys = None if layers.keys is None else layers.keys[order]
    layers = layers._replace(keys=keys, kinds=kinds_L)

    def on_stage(x_SMBTD, rows, layers):
        chunk = _chunk(run, pattern, policy, schedule)
        y_MBTD, results = _ticks(schedule, chunk, x_SMBTD[0], rows, layers)
        return y_MBTD[None], results

    # XLA's CPU compiler dies of a bfloat16 sum over `stage` in here, be it one that a gradient
    # brings in. So every stage has a slot, and the sum over slots, of which all but one are zero,
    # is outside.
    x_MBTD = _split_rows(x_BTD, schedule.micro_batches)
    x_SMBTD = jnp.broadcast_to(x_MBTD[None], (schedule.stages, *x_MBTD.shape))
    rows = jax.tree.map(lambda row: _split_rows(row, schedule.micro_batches), rows)
    split, whole = PartitionSpec("stage"), PartitionSpec()
    y_SMBTD, results = jax.shard_map(
        on_stage, in_specs=(split, whole, split), out_specs=split, axis_names={"stage"},
        check_vma=False,
    )(x_SMBTD, rows, layers)
    y_BTD = _merge_rows(jax.lax.reduce_sum(y_SMBTD, (0,)), 0)
    return constrain(y_BTD, "BTD", between_blocks=True), _merge_results(results)


def _ticks(schedule: Schedule, chunk: Callable, x_MBTD: jax.Array, rows: Any, layers: Any):
    """One stage's part: what it yields of each micro-batch (zero unless it is the last)."""
    stage, last = jax.lax.axis_index("stage"), schedule.stages - 1
    following = [(stage, stage + 1) for stage in range(last)]
    if schedule.rounds > 1:
        following.append((last, 0))

    def tick(carry, time):
        x_BTD, y_MBTD = carry
        item = time - stage
        busy = (item >= 0) & (item < schedule.items)
        turn, micro = schedule.place(jnp.clip(item, 0, schedule.items - 1))
        x_BTD = jnp.where((stage == 0) & (turn == 0), x_MBTD[micro], x_BTD)
        # A waiting stage works too, on zeros: whoever needs its result waits anyway, and all
        # devices meet in the same collectives. Zeros stay finite, so gradients of nothing are zero.
        x_BTD = jnp.where(busy, x_BTD, jnp.zeros_like(x_BTD))
        of_micro = jax.tree.map(lambda row: row[micro], rows)
        x_BTD, results = chunk(turn, micro, x_BTD, of_micro, layers)
        done = busy & (stage == last) & (turn == schedule.rounds - 1)
        y_MBTD = y_MBTD.at[micro].set(jnp.where(done, x_BTD, y_MBTD[micro]))
        return (jax.lax.ppermute(x_BTD, "stage", following), y_MBTD), results

    start = (jnp.zeros_like(x_MBTD[0]), jnp.zeros_like(x_MBTD))
    (_, y_MBTD), results = jax.lax.scan(tick, start, jnp.arange(schedule.ticks))
    results = jax.tree.map(lambda leaf: _by_layer(schedule, leaf, stage), results)
    return y_MBTD, results


def _chunk(run: Callable, pattern: tuple, policy: Callable | None, schedule: Schedule) -> Callable:
    """A stage's layers of one round, for one micro-batch."""

    def chunk(turn, micro, x_BTD, rows, layers):
        if schedule.rounds > 1:
            layers = jax.tree.map(lambda leaf: _of_round(leaf, turn, schedule.rounds), layers)
        if layers.keys is not None and schedule.micro_batches > 1:
            keys = jax.vmap(jax.random.fold_in, (0, None))(layers.keys, micro)
            layers = layers._replace(keys=keys)
        return run(pattern, rows, x_BTD, layers)

    if schedule.rounds == 1:
        return chunk
    return jax.checkpoint(chunk, policy=_policy(policy))


def _policy(policy: Callable | None) -> Callable:
    """What the backward pass keeps of a chunk: what the model's own policy does, and no weights.

    The weights of a round are picked by an index, so that autodiff would keep a copy of them for
    every tick (of 8 layers on 2 stages with 16 micro-batches, 148 MB instead of 38). So what only
    moves numbers is done again.
    """
    if policy is None:
        return lambda primitive, *_, **__: primitive.name not in MOVES

    def keeps(primitive, *avals, **params):
        return params.get("name") == LAYER_INPUT or policy(primitive, *avals, **params)

    return keeps


def _of_round(leaf: jax.Array, turn: jax.Array, rounds: int) -> jax.Array:
    size = leaf.shape[0] // rounds
    return jax.lax.dynamic_slice_in_dim(leaf, turn * size, size)


def _pattern(kinds: Sequence[str], order: np.ndarray, schedule: Schedule):
    """The pattern of kinds within every chunk; (None,) and each layer's kind if chunks differ."""
    size = len(kinds) // (schedule.stages * schedule.rounds)
    chunks = {tuple(kinds[layer] for layer in chunk) for chunk in order.reshape(-1, size)}
    if len(chunks) > 1:
        names = list(dict.fromkeys(kinds))
        return (None,), jnp.asarray([names.index(kinds[layer]) for layer in order], jnp.int32)
    (chunk,) = chunks
    period = next(n for n in range(1, size + 1) if chunk == (chunk[:n] * size)[:size])
    return chunk[:period], None


def _split_rows(x: jax.Array, count: int) -> jax.Array:
    """Micro-batch i takes rows i, i + count, ...: each device keeps the rows that it has."""
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    letters = "BTD"[: x.ndim - 1]
    return jax.vmap(lambda rows: constrain(rows, letters, between_blocks=letters == "BTD"))(x)


def _merge_rows(x: jax.Array, dim: int) -> jax.Array:
    """The inverse of `_split_rows`, where micro-batches are dim `dim` and their rows the next."""
    x = x.swapaxes(dim, dim + 1)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2:])


def _by_layer(schedule: Schedule, leaf: jax.Array, stage: jax.Array) -> jax.Array:
    """Results of this stage's layers by layer and micro-batch, from those of each tick."""
    leaf = jax.lax.dynamic_slice_in_dim(leaf, stage, schedule.items)
    leaf = leaf.reshape(-1, schedule.rounds, schedule.width, *leaf.shape[1:])
    leaf = jnp.moveaxis(leaf, (1, 3), (0, 1))  # round, layer, group, lane
    return leaf.reshape(-1, schedule.micro_batches, *leaf.shape[4:])


def _merge_results(results: Any) -> Any:
    """All rows of what has rows, sums over the micro-batches of what has none, by their names."""

    def merge(path, leaf):
        return _merge_rows(leaf, 1) if path[-1].name.split("_")[-1].startswith("B") else leaf.sum(1)

    return jax.tree_util.tree_map_with_path(merge, results)
