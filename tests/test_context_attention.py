"""Attention of rows that devices share = attention of whole rows, for every mask, with its gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from batiste.models.attention_choice import attention
from batiste.pallas_kernels import AttentionMask, BlockSparsity, certified, reference_attention
from batiste.sharding import MeshConfig, in_row_order, in_time_order, laid_out, make_mesh, time_order
from kernel_cases import make_options

B, T, N, K, H = 2, 40, 8, 4, 6
MASKS = [mask for mask in certified.MASKS if not {"sparse", "offset"} & set(mask)]
RING = MeshConfig(data=2, context=4)


def make_mask(conditions: tuple[str, ...], window: int = 13) -> AttentionMask:
    """Row 0 has two documents and 7 tokens of padding, row 1 three documents; chunks have 5 tokens."""
    ends = np.int32([[16, 33, 33], [3, 22, 40]])
    place = np.arange(T)[None, :, None]
    documents = 1 + (place >= ends[:, None]).sum(-1)
    segments = np.where(place[..., 0] < ends[:, -1:], documents, 0).astype(np.int32)
    segments = jnp.asarray(segments) if "segments" in conditions else None
    return AttentionMask(
        causal="causal" in conditions,
        window=window if "window" in conditions else None,
        sparsity=BlockSparsity(8, 1, 1, 1, seed=2) if "sparse" in conditions else None,
        prefix_B=jnp.int32([0, 17]) if "prefix" in conditions else None,
        query_segments_BT=segments, key_segments_BS=segments,
    )


def value_and_gradients(attend, options, dtype="float32"):
    """out, lse and the gradients of q, k, v and the sinks, from gradients of both results."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, g = (jax.random.normal(key, (B, T, N, H)) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[2:4])
    g_lse = jax.random.normal(keys[4], (B, T, N))

    @jax.jit
    def everything(q, k, v, sinks):
        (out, lse), back = jax.vjp(attend, q, k, v, sinks)
        return out, lse, *back((g.astype(out.dtype), jnp.where(lse == -jnp.inf, 0, g_lse)))

    return everything(*(x.astype(dtype) for x in (q, k, v)), options["sinks_N"])


def shared(mesh_config, mask, options, implementation="reference", dtype="float32"):
    """The same on a mesh, from rows as they come to rows as they come."""

    def attend(q, k, v, sinks):
        moved = dataclasses.replace(
            mask, query_segments_BT=in_time_order(mask.query_segments_BT),
            key_segments_BS=in_time_order(mask.key_segments_BS),
        )
        q, k, v = map(in_time_order, (q, k, v))
        results = attention(implementation, q, k, v, moved, **(options | dict(sinks_N=sinks)))
        return tuple(map(in_row_order, results))

    devices = jax.devices()[:mesh_config.data * mesh_config.context * mesh_config.tensor]
    with jax.set_mesh(make_mesh(mesh_config, devices)), laid_out(mesh_config):
        return value_and_gradients(attend, options, dtype)


def whole(mask, options):
    def attend(q, k, v, sinks):
        return reference_attention(q, k, v, mask, **(options | dict(sinks_N=sinks)))

    return value_and_gradients(attend, options)


def check(mesh_config, conditions, features=(), implementation="reference", tolerance=1e-6, **kinds):
    mask, options = make_mask(conditions, **kinds), make_options(features, N)
    actual = shared(mesh_config, mask, options, implementation)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), actual, whole(mask, options)):
        if b is not None:
            a, b = np.asarray(a), np.asarray(b)
            finite = np.isfinite(b)
            np.testing.assert_array_equal(a[~finite], b[~finite])
            error = np.abs(a[finite] - b[finite]).max() / np.abs(b[finite]).max()
            assert error <= tolerance, (name, error)


@pytest.mark.parametrize("features", [(), ("soft_cap", "sinks", "alibi")], ids=["plain", "features"])
@pytest.mark.parametrize("conditions", MASKS, ids=lambda mask: "+".join(mask) or "full")
def test_a_ring_knows_every_mask(conditions, features):
    check(RING, conditions, features)
