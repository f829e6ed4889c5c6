"""In which order the tokens of a row lie on the devices of `context`: known here and nowhere else.

A causal query at the end of a row sees all keys, one at its beginning few. So for a ring, a row is
cut into two chunks a device, and device i of C holds chunks i and 2 C - 1 - i ("zig-zag"),
so that all have the same work:

    row      0  1  2  3  4  5        C = 3
    device   0  1  2  2  1  0        device 0 holds 0 5, device 1 holds 1 4, device 2 holds 2 3
"""

import jax
import jax.numpy as jnp
import numpy as np

from batiste.sharding.layout import layout


def context_size() -> int:
    """How many devices share a row on the ambient mesh; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1)


def time_order(length: int) -> np.ndarray | None:
    """The place in its row of each token as rows lie on the mesh, int32 T; None is as it comes.

    Raises ValueError when the chunks would not be equal.
    """
    parts = context_size()
    if parts == 1 or layout().context_exchange != "ring":
        return None
    if length % (2 * parts):
        raise ValueError(
            f"rows of {length} tokens are not divisible by 2 * mesh.context={2 * parts}, the "
            "chunks of a ring: choose sizes that divide, or mesh.context_exchange='all_to_all'"
        )
    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    devices = np.arange(parts)
    return chunks[np.stack([devices, 2 * parts - 1 - devices], axis=1)].reshape(-1)


def chunk_place(device: jax.Array, chunk: jax.Array | int, size: int) -> jax.Array:
    """The place in its row of the first token of a device's chunk 0 or 1 of `size` tokens."""
    return (device + chunk * (2 * context_size() - 1 - 2 * device)) * size


def in_time_order(x: jax.Array | None) -> jax.Array | None:
    """Rows (B, T, ...) in the order of `time_order`; None stays None."""
    order = None if x is None else time_order(x.shape[1])
    return x if order is None else _reordered(x, order)


def in_row_order(x: jax.Array) -> jax.Array:
    """Undoes `in_time_order`."""
    order = time_order(x.shape[1])
    return x if order is None else _reordered(x, np.argsort(order))


def _reordered(x: jax.Array, order: np.ndarray) -> jax.Array:
    """Time in this order, run by run: inside a slice, XLA's partitioner dies of a gather of it."""
    runs = np.split(order, np.flatnonzero(np.diff(order) != 1) + 1)
    return jnp.concatenate([x[:, run[0] : run[-1] + 1] for run in runs], axis=1)
