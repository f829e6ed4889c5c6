"""Software pipelining by hand: the matrix units work on one unit while the vector units work on another.

    time ->      unit 0    unit 1    unit 2    unit 3
    first  (MXU)   A0        A1        A2        A3      scores of the next unit
    middle (VPU)             B0        B1        B2      softmax of this one
    last   (MXU)                       C0        C1      products of the one before

The compiler schedules a straight run of code well and never moves work across the end of a loop's
body. So a body holds all units of a tile, and its ends are sewn together: it computes the scores of
the next tile's first unit, and finishes the last unit of the tile before. Two slots of scratch
memory, even and odd, carry what passes between the stages.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Unit(NamedTuple):
    """A piece of a tile: where its queries and keys begin inside the tile, and of which head."""

    query: int
    key: int
    head: int = 0


class Stages(NamedTuple):
    """The three stages of one unit, each called as stage(tile, unit, slot), and `idle`.

    `idle()` fills the odd slot so that `last` on it changes nothing.
    """

    first: Callable
    middle: Callable
    last: Callable
    idle: Callable


def straight(stages: Stages, tile: jax.Array, units: Sequence[Unit]) -> None:
    """Works off one tile: for tiles that need a mask, which are few."""
    for time in range(len(units) + 2):
        if time < len(units):
            stages.first(tile, units[time], time % 2)
        if time >= 2:
            stages.last(tile, units[time - 2], time % 2)
        if 1 <= time <= len(units):
            stages.middle(tile, units[time - 1], (time - 1) % 2)


def looped(
    stages: Stages, tile_at: Callable[[jax.Array], jax.Array], count: jax.Array,
    units: Sequence[Unit],
) -> None:
    """Works off `count` >= 1 tiles, `tile_at(0)` and so on, with no gap between them."""
    if len(units) % 2:  # The slots would not alternate across the seam.
        jax.lax.fori_loop(0, count, lambda index, _: straight(stages, tile_at(index), units), None)
        return
    stages.idle()
    stages.first(tile_at(0), units[0], 0)

    def body(index, _):
        tile = tile_at(index)
        before, after = tile_at(jnp.maximum(index - 1, 0)), tile_at(jnp.minimum(index + 1, count - 1))
        for time, unit in enumerate(units):
            is_first, is_last = time == 0, time == len(units) - 1
            stages.first(after if is_last else tile, units[(time + 1) % len(units)], (time + 1) % 2)
            stages.last(before if is_first else tile, units[time - 1], (time + 1) % 2)
            stages.middle(tile, unit, time % 2)

    jax.lax.fori_loop(0, count, body, None)
    stages.last(tile_at(count - 1), units[-1], 1)
