"""Multi-head latent attention: keys and values of all heads out of one short vector a token."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from batiste.models.attention import Attend, Given, LayerCache, write
from batiste.models.attention_choice import OneOf
from batiste.models.config import TransformerConfig
from batiste.models.layer_sums import AttentionSums, attention_sums
from batiste.models.layers import Norm, project, residual_gain
from batiste.models.parameter import matrix
from batiste.models.positions import rotate
from batiste.pallas_kernels import AttentionMask
from batiste.sharding import constrain


# Of its own norms in every model that has been published, whatever that of the others is.
INNER_EPSILON = 1e-6


class LatentAttention(nnx.Module):
    """DeepSeek's attention (MLA, arXiv:2405.04434, section 2.1).

    A token's latent gives every head its key and its value; the last `rope_dim` of each key are
    rotated, and the same for all heads. A cache holds latents and rotated keys alone: with it,
    queries are taken to the latent's space and what they attend to is taken back from there.
    R is the rank of queries in query_*, of the latent in up_RNH, and with `rope_dim` in down_DR.
    H is head_dim for queries, its unrotated part and value_dim in up_RNH, value_dim in out_NHD.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.latent, self.rotated, value = config.latent_rank, config.rope_dim, config.value_dim
        self.own = config.head_dim - config.rope_dim
        self.attend = Attend(config)
        stddev, gain = config.init_stddev, residual_gain(config)
        inner = dataclasses.replace(config, norm_epsilon=INNER_EPSILON)

        def weight(letters: str, inputs: str, gain: float = 1.0, **sizes: int) -> nnx.Param:
            return matrix(
                rngs, letters, config.sizes | sizes, inputs=inputs, stddev=stddev, gain=gain)

        rank = config.query_rank
        low = rank is not None
        self.query_DNH = None if low else weight("DNH", "D")
        self.query_down_DR = weight("DR", "D", R=rank) if low else None
        self.query_norm = Norm(inner, "R", rank) if low else None
        self.query_up_RNH = weight("RNH", "R", R=rank) if low else None
        self.down_DR = weight("DR", "D", R=self.latent + self.rotated)
        self.latent_norm = Norm(inner, "R", self.latent)
        self.up_RNH = weight("RNH", "R", R=self.latent, H=self.own + value)
        self.out_NHD = weight("NHD", "NH", gain, H=value)

    @staticmethod
    def cache_sizes(config: TransformerConfig) -> tuple[int, int, int]:
        """Latents and rotated keys for keys, and nothing for values."""
        return 1, config.latent_rank + config.rope_dim, 0

    def __call__(
        self,
        x_BTD: jax.Array,
        mask: AttentionMask | OneOf,
        given: Given,
        cache: LayerCache | None,
        dropout_key: jax.Array | None,
        measured: bool,
    ) -> tuple[jax.Array, LayerCache | None, AttentionSums | None]:
        """As `Attention`; what a cache holds is k_BSKH, with one K of latent_rank + rope_dim."""
        q_BTNH = self._queries(x_BTD)
        own_BTNH = q_BTNH[..., : self.own]
        turned_BTNH = rotate(q_BTNH[..., self.own:], given.rotation)
        down_BTR = project(x_BTD, self.down_DR[...])
        latent_BTR = self.latent_norm(down_BTR[..., : self.latent])
        key_BTR = rotate(down_BTR[:, :, None, self.latent:], given.rotation)[:, :, 0]
        if cache is not None:
            seen_BTKH = jnp.concatenate([latent_BTR, key_BTR], axis=-1)[:, :, None]
            k_BSKH = write(cache.k_BSKH, seen_BTKH, mask)
            out_BTNH = self._from_cache(own_BTNH, turned_BTNH, k_BSKH, mask)
            out_BTD = project(out_BTNH, self.out_NHD[...], (0, 1))
            return out_BTD, LayerCache(k_BSKH, cache.v_BSKH), None
        up_BTNH = project(latent_BTR, self.up_RNH[...])
        keys_BTNR = jnp.broadcast_to(
            key_BTR[:, :, None], (*up_BTNH.shape[:3], self.rotated))
        k_BTKH = jnp.concatenate([up_BTNH[..., : self.own], keys_BTNR], axis=-1)
        q_BTNH = checkpoint_name(jnp.concatenate([own_BTNH, turned_BTNH], axis=-1), "query")
        k_BTKH = checkpoint_name(k_BTKH, "key")
        v_BTKH = checkpoint_name(up_BTNH[..., self.own:], "value")
        logits = self.attend.logits(q_BTNH)
        sums = attention_sums(q_BTNH, k_BTKH, mask, logits) if measured else None
        # Every implementation has values as wide as keys: what is added is zero and cut off again.
        value, wide = v_BTKH.shape[-1], k_BTKH.shape[-1]
        v_BTKH = jnp.pad(v_BTKH, ((0, 0), (0, 0), (0, 0), (0, wide - value)))
        out_BTNH = self.attend(
            q_BTNH, (k_BTKH, v_BTKH), mask, logits, ("BTKH", dropout_key))[..., :value]
        out_BTNH = checkpoint_name(out_BTNH, "attended")
        return project(out_BTNH, self.out_NHD[...], (0, 1)), None, sums

    def _queries(self, x_BTD: jax.Array) -> jax.Array:
        if self.query_DNH is not None:
            return project(x_BTD, self.query_DNH[...])
        low_BTR = self.query_norm(project(x_BTD, self.query_down_DR[...]))
        return project(low_BTR, self.query_up_RNH[...])

    def _from_cache(self, own_BTNH, turned_BTNH, k_BSKH, mask) -> jax.Array:
        """Attends in the latent's space: its vectors are the keys, and the values too."""
        k_BSKH = constrain(k_BSKH[:, :, 0], "BSR")[:, :, None]
        up_RNH = self.up_RNH[...].astype(own_BTNH.dtype)
        key_RNH, value_RNH = up_RNH[..., : self.own], up_RNH[..., self.own:]
        q_BTNR = jnp.einsum("btnh,rnh->btnr", own_BTNH, key_RNH,
                            preferred_element_type=jnp.float32).astype(own_BTNH.dtype)
        q_BTNH = jnp.concatenate([q_BTNR, turned_BTNH], axis=-1)
        logits, rest = self.attend.logits(q_BTNH), (None, None)
        seen_BTNR = self.attend(q_BTNH, (k_BSKH, k_BSKH), mask, logits, rest)[..., : self.latent]
        return jnp.einsum("btnr,rnh->btnh", seen_BTNR, value_RNH,
                          preferred_element_type=jnp.float32).astype(own_BTNH.dtype)
