"""Texts to unit vectors."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from batiste.data import TextReader
from batiste.sharding import RULES, Share
from batiste.tasks.heads import hidden, pooled, unit
from batiste.tasks.rows import padded_rows

ROWS = 32
SHORTEST = 16  # Rows are 16, 32, 64, ... tokens long, so that few programs are compiled.


class Embedder:
    """An encoder as a function from texts to unit vectors.

    graphdef, params: the encoder's, on `mesh`. pool: as in HeadConfig; the mean is what
    sentence-transformers (arXiv:1908.10084) takes. max_length: a longer text is cut.
    """

    def __init__(
        self, graphdef: Any, params: Any, reader: TextReader, mesh: jax.sharding.Mesh,
        pool: str, max_length: int,
    ):
        self._params, self._reader, self._mesh = params, reader, mesh
        self._longest = max_length

        def vectors(params, rows):
            return unit(pooled(hidden(nnx.merge(graphdef, params), rows), rows, pool))

        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._vectors = jax.jit(vectors, out_shardings=whole)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of all texts, [texts, D], float32."""
        rows = list(self.stream(texts))
        return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)

    def stream(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """The same, some texts at a time."""
        devices = int(np.prod([self._mesh.shape[axis] for axis in RULES["B"]]))
        size = -(-ROWS // devices) * devices
        share = Share(self._mesh, size)
        for start in range(0, len(texts), size):
            reads = [self._reader.read(text, None, self._longest, False)
                     for text in texts[start:start + size]]
            longest = max([SHORTEST, *(len(read.tokens) for read in reads)])
            length = min(1 << (longest - 1).bit_length(), self._longest)
            rows = padded_rows(reads, length, self._reader.pad_id)
            filled = type(rows)(*(np.pad(x_BT, ((0, size - len(reads)), (0, 0))) for x_BT in rows))
            with jax.set_mesh(self._mesh):
                yield np.asarray(self._vectors(self._params, share.place(filled)))[: len(reads)]
