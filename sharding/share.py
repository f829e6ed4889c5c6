"""Which rows of a global batch a process reads, and how the global arrays come of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from batiste.sharding.rules import spec


@dataclasses.dataclass(frozen=True)
class Share:
    """This process's part of batches of `num_rows` rows, which `mesh` splits by rows alone.

    Processes may hold rows that do not follow each other, and the same rows as others do.
    """

    mesh: Mesh
    num_rows: int

    @property
    def sharding(self) -> NamedSharding:
        """Where the rows of the global arrays live."""
        return NamedSharding(self.mesh, spec("B"))

    @functools.cached_property
    def rows(self) -> np.ndarray | None:
        """The rows of the global batch to read, ascending; None for all of them."""
        if not self.mesh.is_multi_process:
            return None
        slices = self.sharding.addressable_devices_indices_map((self.num_rows,)).values()
        return np.unique(np.concatenate([np.arange(self.num_rows)[rows] for (rows,) in slices]))

    def place(self, tree: Any) -> Any:
        """Global arrays on the mesh of arrays that hold this process's rows and whole other dims.

        An explicit transfer, so no guard objects.
        """
        if self.rows is None:
            return jax.device_put(tree, self.sharding)
        return jax.tree.map(self._place, tree)

    def _place(self, x: np.ndarray) -> jax.Array:
        def piece(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self.num_rows)
            here = np.searchsorted(self.rows, start)
            return x[here : here + stop - start]

        return _assemble((self.num_rows, *x.shape[1:]), self.sharding, piece)


def replicate(mesh: Mesh, x: np.ndarray) -> jax.Array:
    """A host array that every process has, whole on every device of the mesh."""
    return _assemble(x.shape, NamedSharding(mesh, spec("")), lambda index: x[index])


def _assemble(
    shape: tuple[int, ...], sharding: NamedSharding, piece: Callable[[Any], np.ndarray]
) -> jax.Array:
    """A global array from the pieces of this process's devices; `piece` takes an index of it."""
    indices = sharding.addressable_devices_indices_map(shape)
    pieces = jax.device_put([piece(index) for index in indices.values()], list(indices))
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)
