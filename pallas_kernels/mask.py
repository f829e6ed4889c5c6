"""Who may look at whom: a mask that is described, so that a kernel can skip what it hides."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """The intersection of the conditions that are given.

    causal: a query sees keys up to its own place.
    window: a query sees the `window` latest places, its own included.
    query_segments_BT, key_segments_BS: a query sees keys of its own segment; 0 is padding.
    query_offset_B: the place among the keys of each row's first query (cached decoding).
    """

    causal: bool = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    query_segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    query_offset_B: jax.Array | None = None

    def distance_BTS(self, num_queries: int, num_keys: int) -> jax.Array:
        """Place of the query minus place of the key, int32; B is 1 when all rows agree."""
        place_BT = jnp.arange(num_queries, dtype=jnp.int32)[None]
        if self.query_offset_B is not None:
            place_BT = place_BT + self.query_offset_B[:, None]
        return place_BT[:, :, None] - jnp.arange(num_keys, dtype=jnp.int32)[None, None]

    def visible_BTS(self, num_queries: int, num_keys: int) -> jax.Array | None:
        """The mask as booleans, for the reference; None when everything is visible."""
        conditions = []
        if self.causal:
            conditions.append(self.distance_BTS(num_queries, num_keys) >= 0)
        if self.window is not None:
            conditions.append(jnp.abs(self.distance_BTS(num_queries, num_keys)) < self.window)
        if self.query_segments_BT is not None:
            query_BT1, key_B1S = self.query_segments_BT[:, :, None], self.key_segments_BS[:, None]
            conditions.append((query_BT1 == key_B1S) & (query_BT1 != 0))
        if not conditions:
            return None
        visible_BTS = conditions[0]
        for condition in conditions[1:]:
            visible_BTS = visible_BTS & condition
        return visible_BTS
