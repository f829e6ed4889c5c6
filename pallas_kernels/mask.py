"""Who may look at whom: a mask that is described, so that a kernel can skip what it hides."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class BlockSparsity:
    """Which blocks of keys a block of queries sees: near ones, global ones and random ones.

    block: tokens in a block.
    window_blocks: a block sees blocks nearer than this, itself included (Longformer,
        arXiv:2004.05150).
    global_blocks: the first blocks see all and are seen by all.
    random_blocks: as many blocks, drawn from `seed` for each block of queries (BigBird,
        arXiv:2007.14062), from the past alone when the mask is causal.
    """

    block: int
    window_blocks: int
    global_blocks: int = 0
    random_blocks: int = 0
    seed: int = 0

    def layout(self, num_blocks: int, causal: bool) -> np.ndarray:
        """Booleans (num_blocks, num_blocks): block of queries, block of keys."""
        index = np.arange(num_blocks)
        seen = np.abs(index[:, None] - index[None]) < self.window_blocks
        seen |= (index < self.global_blocks)[:, None] | (index < self.global_blocks)[None]
        for query in range(num_blocks):
            choices = query + 1 if causal else num_blocks
            drawn = np.random.default_rng((self.seed, query)).permutation(choices)
            seen[query, drawn[: self.random_blocks]] = True
        return seen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """The intersection of the conditions that are given.

    causal: a query sees keys up to its own place.
    window: a query sees the `window` latest places, its own included; both sides if not causal.
    sparsity: a query sees the blocks of keys that its block sees.
    prefix_B: the first keys of each row, which `causal` does not hide (prefix language models).
    query_segments_BT, key_segments_BS: a query sees keys of its own segment; 0 is padding.
    query_offset_B: the place among the keys of each row's first query (cached decoding).
    """

    causal: bool = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    sparsity: BlockSparsity | None = dataclasses.field(default=None, metadata={"static": True})
    prefix_B: jax.Array | None = None
    query_segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    query_offset_B: jax.Array | None = None

    def place_BT(self, num_queries: int) -> jax.Array:
        """Place of each query among the keys, int32; B is 1 when all rows agree."""
        place_BT = jnp.arange(num_queries, dtype=jnp.int32)[None]
        return place_BT if self.query_offset_B is None else place_BT + self.query_offset_B[:, None]

    def distance_BTS(self, num_queries: int, num_keys: int) -> jax.Array:
        """Place of the query minus place of the key, int32; B is 1 when all rows agree."""
        return self.place_BT(num_queries)[:, :, None] - _keys(num_keys)

    def visible_BTS(self, num_queries: int, num_keys: int) -> jax.Array | None:
        """The mask as booleans, for the reference; None when everything is visible."""
        conditions = []
        if self.causal:
            past_BTS = self.distance_BTS(num_queries, num_keys) >= 0
            if self.prefix_B is not None:
                past_BTS = past_BTS | (_keys(num_keys) < self.prefix_B[:, None, None])
            conditions.append(past_BTS)
        if self.window is not None:
            conditions.append(jnp.abs(self.distance_BTS(num_queries, num_keys)) < self.window)
        if self.sparsity is not None:
            conditions.append(self._sparse_BTS(num_queries, num_keys))
        if self.query_segments_BT is not None:
            query_BT1, key_B1S = self.query_segments_BT[:, :, None], self.key_segments_BS[:, None]
            conditions.append((query_BT1 == key_B1S) & (query_BT1 != 0))
        if not conditions:
            return None
        visible_BTS = conditions[0]
        for condition in conditions[1:]:
            visible_BTS = visible_BTS & condition
        return visible_BTS

    def every(self, stride: int) -> "AttentionMask":
        """The mask of every `stride`-th query alone, counted from 1, over all keys."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.query_segments_BT is not None:
            fields["query_segments_BT"] = self.query_segments_BT[:, stride - 1 :: stride]
        return _Strided(**fields, stride=stride)

    def _sparse_BTS(self, num_queries: int, num_keys: int) -> jax.Array:
        block = self.sparsity.block
        layout = self.sparsity.layout(-(-max(num_queries, num_keys) // block), self.causal)
        rows_BTS = jnp.asarray(layout)[self.place_BT(num_queries) // block]
        return rows_BTS[:, :, np.arange(num_keys) // block]


@dataclasses.dataclass(frozen=True)
class _Strided(AttentionMask):
    """For the reference; no kernel knows it."""

    stride: int = 1

    def place_BT(self, num_queries: int) -> jax.Array:
        index_BT = jnp.arange(num_queries, dtype=jnp.int32)[None]
        place_BT = self.stride * index_BT + self.stride - 1
        return place_BT if self.query_offset_B is None else place_BT + self.query_offset_B[:, None]


def _keys(num_keys: int) -> jax.Array:
    return jnp.arange(num_keys, dtype=jnp.int32)[None, None]
