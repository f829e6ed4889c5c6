"""Every token to the experts it chose and back, on one device and between devices.

Beside the alphabet, here: M tokens of a device, Q = M * C their copies, one for each expert that
they chose, sorted by expert; W rows that the experts of this device have room for.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

AXIS = "expert"


class Pieces(NamedTuple):
    """Runs of rows that this device exchanges, one with each expert of each device.

    starts: where a run begins in the array here. starts_there: where in the other device's.
    sizes: how many rows. int32, as many as there are experts, device by device.
    """

    starts: jax.Array
    starts_there: jax.Array
    sizes: jax.Array


class Routes(NamedTuple):
    """Where the copies of this device's tokens go; all integers.

    order_Q: the copies, numbered token by token, in order of their experts. rank_Q: the inverse.
    load_E: rows for each of this device's experts. sent, received: None without exchange.
    """

    order_Q: jax.Array
    rank_Q: jax.Array
    load_E: jax.Array
    sent: Pieces | None
    received: Pieces | None


def plan(chosen_MC: jax.Array, num_experts: int, devices: int) -> Routes:
    """The routes of the tokens of this device, one of `devices` along `expert`."""
    chosen_Q = chosen_MC.reshape(-1)
    order_Q = jnp.argsort(chosen_Q, stable=True)
    rank_Q = jnp.argsort(order_Q)
    # Compared and summed: as a bincount it is a scatter, which a TPU does row by row.
    experts_E = jnp.arange(num_experts, dtype=chosen_Q.dtype)
    load_E = (chosen_Q[:, None] == experts_E[None]).sum(axis=0, dtype=jnp.int32)
    if devices == 1:
        return Routes(order_Q, rank_Q, load_E, None, None)
    # From everybody's loads, sources first, each device knows where everything lies everywhere.
    loads = jax.lax.all_gather(load_E, AXIS).reshape(devices, devices, -1)
    me = jax.lax.axis_index(AXIS)
    flat = loads.reshape(devices, -1)
    starts_sent = (jnp.cumsum(flat, axis=1) - flat).reshape(loads.shape)
    total = loads.sum(axis=0)
    starts_of_experts = jnp.cumsum(total, axis=1) - total
    starts_received = starts_of_experts[None] + jnp.cumsum(loads, axis=0) - loads
    sent = Pieces(*(x[me].reshape(-1) for x in (starts_sent, starts_received, loads)))
    received = Pieces(*(x[:, me].reshape(-1) for x in (starts_received, starts_sent, loads)))
    return Routes(order_Q, rank_Q, total[me], sent, received)


def room(chosen_MC: jax.Array, num_experts: int, devices: int) -> int:
    """W: the most rows that the experts of a device can be sent, so that none is ever dropped.

    A token chooses an expert once, so a device gets at most as many copies of it as it has experts.
    """
    M, C = chosen_MC.shape
    return devices * M * min(C, num_experts // devices)


def scatter(x_MD: jax.Array, routes: Routes, rows: int) -> jax.Array:
    """x_WD: what the experts of this device are sent, by expert, then by source; zeros follow."""
    x_QD = _copies(x_MD, routes.order_Q, routes.rank_Q)
    if routes.sent is None:
        return x_QD
    return _exchange(x_QD, routes.sent, routes.received, rows, x_MD.shape[0])


def gather(y_WD: jax.Array, weights_MC: jax.Array, routes: Routes) -> jax.Array:
    """y_MD: the way back of `scatter`, and each token's weighted sum over its copies, in fp32."""
    y_QD = y_WD
    if routes.sent is not None:
        y_QD = _exchange(y_WD, routes.received, routes.sent, weights_MC.size, len(weights_MC))
    y_QD = _permuted(y_QD, routes.rank_Q, routes.order_Q)
    y_MCD = y_QD.reshape(*weights_MC.shape, -1).astype(jnp.float32)
    return (y_MCD * weights_MC[..., None]).sum(axis=1).astype(y_WD.dtype)


# Autodiff would turn the gathers of these three into scatters; each is another gather.


@jax.custom_vjp
def _copies(x_MD: jax.Array, order_Q: jax.Array, rank_Q: jax.Array) -> jax.Array:
    del rank_Q
    return x_MD[order_Q // (order_Q.size // x_MD.shape[0])]


def _copies_backward(saved, gradient_QD):
    rank_Q, M = saved
    gradient_MCD = gradient_QD[rank_Q].reshape(M, -1, gradient_QD.shape[1])
    total_MD = gradient_MCD.astype(jnp.float32).sum(axis=1)
    return total_MD.astype(gradient_QD.dtype), None, None


_copies.defvjp(
    lambda x_MD, order_Q, rank_Q: (_copies(x_MD, order_Q, rank_Q), (rank_Q, x_MD.shape[0])),
    _copies_backward,
)


@jax.custom_vjp
def _permuted(x_QD: jax.Array, order_Q: jax.Array, rank_Q: jax.Array) -> jax.Array:
    del rank_Q
    return x_QD[order_Q]


_permuted.defvjp(
    lambda x_QD, order_Q, rank_Q: (x_QD[order_Q], rank_Q),
    lambda rank_Q, gradient_QD: (gradient_QD[rank_Q], None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _exchange(
    x: jax.Array, sent: Pieces, received: Pieces, rows: int, longest: int
) -> jax.Array:
    """`rows` rows with what the others sent here; its gradient goes the opposite way.

    Where the compiler has it (TPU, GPU), a ragged all-to-all moves the rows that there are,
    straight to their places. A CPU has not: there each run is padded to the longest possible.
    """
    ways = {"cpu": functools.partial(_padded, longest=longest), "default": _ragged}
    empty = jnp.zeros((rows, x.shape[1]), x.dtype)
    return jax.lax.platform_dependent(x, empty, sent, received, **ways)


def _ragged(x: jax.Array, empty: jax.Array, sent: Pieces, received: Pieces) -> jax.Array:
    return jax.lax.ragged_all_to_all(
        x, empty, sent.starts, sent.sizes, sent.starts_there, received.sizes, axis_name=AXIS
    )


def _padded(
    x: jax.Array, empty: jax.Array, sent: Pieces, received: Pieces, *, longest: int
) -> jax.Array:
    places = jnp.arange(longest, dtype=jnp.int32)[None]

    def of(pieces: Pieces, beyond: int) -> jax.Array:
        inside = places < pieces.sizes[:, None]
        return jnp.where(inside, pieces.starts[:, None] + places, beyond)

    runs = x.at[of(sent, len(x))].get(mode="fill", fill_value=0)
    runs = jax.lax.all_to_all(runs, AXIS, 0, 0, tiled=True)
    return empty.at[of(received, len(empty))].set(runs, mode="drop")


def _exchange_backward(rows: int, longest: int, saved, gradient: jax.Array):
    sent, received, rows_sent = saved
    return _exchange(gradient, received, sent, rows_sent, longest), None, None


_exchange.defvjp(
    lambda x, sent, received, rows, longest: (
        _exchange(x, sent, received, rows, longest), (sent, received, x.shape[0])
    ),
    _exchange_backward,
)
