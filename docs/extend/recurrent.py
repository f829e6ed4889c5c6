"""Mixers: --config.model.mixer=docs/extend/recurrent.py:GatedRecurrence, and ...:LSTM."""

import jax
import jax.numpy as jnp
from flax import nnx

from batiste.models import TransformerConfig
from batiste.models.attention import LayerCache, write
from batiste.models.layers import add_bias, project, residual_gain
from batiste.models.parameter import matrix, vector


GATES = ("enter", "forget", "leave", "new")


class GatedRecurrence(nnx.Module):
    """h_t = a_t h_{t-1} + (1 - a_t) v_t with a_t of x_t alone (minGRU, arXiv:2410.01201), gated.

    Its F is the feed-forward's. Documents of a row know nothing of each other.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        def weight(letters: str, gain: float = 1.0) -> nnx.Param:
            return matrix(rngs, letters, config.sizes, inputs=letters[0],
                          stddev=config.init_stddev, gain=gain)

        self.keep_DF, self.value_DF, self.gate_DF = (weight("DF") for _ in range(3))
        self.keep_bias_F = vector("F", config.sizes, 2.0)  # Remembers about eight tokens at first.
        self.out_FD = weight("FD", residual_gain(config))

    @staticmethod
    def cache_sizes(config: TransformerConfig) -> tuple[int, int, int]:
        """The state after each token, as one head's key; no values."""
        return 1, config.mlp_dim, 0

    def __call__(self, x_BTD, mask, given, cache, dropout_key, measured):
        """out_BTD, the cache with the new states, and no statistics of attention."""
        keep_BTF = add_bias(project(x_BTD, self.keep_DF[...]), self.keep_bias_F)
        keep_BTF = jax.nn.sigmoid(keep_BTF.astype(jnp.float32))
        new_BTF = (1 - keep_BTF) * project(x_BTD, self.value_DF[...]).astype(jnp.float32)
        if cache is None:
            keep_BTF = jnp.where(begins(mask, keep_BTF.shape[1])[..., None], 0, keep_BTF)
        else:
            before_BF = last(cache.k_BSKH, mask.query_offset_B)
            new_BTF = new_BTF.at[:, 0].add(keep_BTF[:, 0] * before_BF)
        _, h_BTF = jax.lax.associative_scan(_then, (keep_BTF, new_BTF), axis=1)
        h_BTF = h_BTF.astype(x_BTD.dtype)
        if cache is not None:
            cache = LayerCache(write(cache.k_BSKH, h_BTF[:, :, None], mask), cache.v_BSKH)
        gate_BTF = jax.nn.silu(project(x_BTD, self.gate_DF[...]).astype(jnp.float32))
        out_BTD = project(h_BTF * gate_BTF.astype(x_BTD.dtype), self.out_FD[...])
        return out_BTD, cache, None



class LSTM(nnx.Module):
    """One recurrent layer of R = model_dim units, step by step (Gers et al. 2000)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        def weight(letters: str, gain: float = 1.0) -> nnx.Param:
            return matrix(rngs, letters, config.sizes, inputs=letters[0],
                          stddev=config.init_stddev, gain=gain)

        for gate in GATES:
            setattr(self, f"{gate}_DR", weight("DR"))
            setattr(self, f"{gate}_back_RR", weight("RR"))
            setattr(self, f"{gate}_bias_R", vector("R", config.sizes, float(gate == "forget")))
        self.out_RD = weight("RD", residual_gain(config))

    @staticmethod
    def cache_sizes(config: TransformerConfig) -> tuple[int, int, int]:
        """The output after each token as one head's key, the cell as its value."""
        return 1, config.sizes["R"], config.sizes["R"]

    def __call__(self, x_BTD, mask, given, cache, dropout_key, measured):
        """out_BTD, the cache with the new states, and no statistics of attention."""
        inputs = [project(x_BTD, getattr(self, f"{gate}_DR")[...]).astype(jnp.float32)
                  + getattr(self, f"{gate}_bias_R")[...][None, None] for gate in GATES]
        back = [getattr(self, f"{gate}_back_RR")[...] for gate in GATES]
        batch, length, units = inputs[0].shape
        if cache is None:
            zeros_BR = jnp.zeros((batch, units), jnp.float32)
            start, begins_BT = (zeros_BR, zeros_BR), begins(mask, length)
        else:
            start = tuple(last(states, mask.query_offset_B) for states in cache[:2])
            begins_BT = jnp.zeros((1, length), bool)
        begins_BT = jnp.broadcast_to(begins_BT, (batch, length))

        def step(state, given):
            h_BR, c_BR = (jnp.where(given[1][:, None], 0, part) for part in state)
            enter, forget, leave, new = (
                x_BR + project(h_BR, w_RR) for x_BR, w_RR in zip(given[0], back, strict=True))
            c_BR = jax.nn.sigmoid(forget) * c_BR + jax.nn.sigmoid(enter) * jnp.tanh(new)
            state = jax.nn.sigmoid(leave) * jnp.tanh(c_BR), c_BR
            return state, state

        along = ([x_BTR.swapaxes(0, 1) for x_BTR in inputs], begins_BT.T)
        _, states = jax.lax.scan(step, start, along)
        h_BTR, c_BTR = (part.swapaxes(0, 1).astype(x_BTD.dtype) for part in states)
        if cache is not None:
            cache = LayerCache(write(cache.k_BSKH, h_BTR[:, :, None], mask),
                               write(cache.v_BSKH, c_BTR[:, :, None], mask))
        return project(h_BTR, self.out_RD[...]), cache, None


def _then(first, second):
    """Two steps of h -> a h + b as one."""
    return first[0] * second[0], second[0] * first[1] + second[1]


def begins(mask, length: int) -> jax.Array:
    """Where a document begins, bool BT (B is 1 where rows are one document each)."""
    segments_BT = mask.query_segments_BT
    if segments_BT is None:
        return (jnp.arange(length) == 0)[None]
    return segments_BT != jnp.pad(segments_BT, ((0, 0), (1, 0)))[:, :-1]


def last(states_BSKH: jax.Array, length_B: jax.Array) -> jax.Array:
    """The state after the tokens that each row has so far, float32; zeros before the first."""
    place_B = jnp.maximum(length_B - 1, 0)[:, None, None, None]
    state_BF = jnp.take_along_axis(states_BSKH, place_B, axis=1)[:, 0, 0].astype(jnp.float32)
    return jnp.where(length_B[:, None] > 0, state_BF, 0)
