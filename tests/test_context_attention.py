"""Attention of rows that devices share is that of whole rows, gradients included: every mask."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from batiste.models.attention_choice import attention
from batiste.pallas_kernels import (
    AttentionMask, BlockSparsity, Operands, Options, attend_piece, attend_piece_gradients,
    certified, merge, of_loss, reference_attention,
)
from batiste.sharding import MeshConfig, in_row_order, in_time_order, laid_out, make_mesh
from kernel_cases import make_options
from kernel_checks import assert_close

B, T, N, K, H = 2, 48, 8, 4, 6
MASKS = [mask for mask in certified.MASKS if not {"sparse", "offset"} & set(mask)]
RING = MeshConfig(data=2, context=4)


def make_mask(conditions: tuple[str, ...], window: int = 13) -> AttentionMask:
    """Three documents a row, and in row 0 padding; chunks of RING have 6 tokens."""
    ends = np.int32([[16, 33, 41], [3, 22, 48]])
    place = np.arange(T)[None, :, None]
    documents = 1 + (place >= ends[:, None]).sum(-1)
    segments = np.where(place[0].T < ends[:, -1:], documents, 0).astype(np.int32)
    segments = jnp.asarray(segments) if "segments" in conditions else None
    return AttentionMask(
        causal="causal" in conditions,
        window=window if "window" in conditions else None,
        sparsity=BlockSparsity(8, 1, 1, 1, seed=2) if "sparse" in conditions else None,
        prefix_B=jnp.int32([0, 17]) if "prefix" in conditions else None,
        query_segments_BT=segments, key_segments_BS=segments,
    )


def value_and_gradients(attend, options, dtype="float32"):
    """out, lse and the gradients of q, k, v and the sinks, jitted; and what to call it with."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, g = (jax.random.normal(key, (B, T, N, H)) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[2:4])
    g_lse = jax.random.normal(keys[4], (B, T, N))

    def everything(q, k, v, sinks):
        (out, lse), back = jax.vjp(attend, q, k, v, sinks)
        return out, lse, *back((g.astype(out.dtype), jnp.where(lse == -jnp.inf, 0, g_lse)))

    return jax.jit(everything), (*(x.astype(dtype) for x in (q, k, v)), options["sinks_N"])


def across_context(mask, options, implementation="reference"):
    """Attention on the ambient mesh, from rows as they come to rows as they come."""

    def attend(q, k, v, sinks):
        moved = dataclasses.replace(
            mask, query_segments_BT=in_time_order(mask.query_segments_BT),
            key_segments_BS=in_time_order(mask.key_segments_BS),
        )
        q, k, v = map(in_time_order, (q, k, v))
        results = attention(implementation, q, k, v, moved, **(options | dict(sinks_N=sinks)))
        return tuple(map(in_row_order, results))

    return attend


@contextlib.contextmanager
def on(config: MeshConfig):
    """The mesh, of as many devices as it takes."""
    devices = jax.devices()[:config.data * config.context * config.tensor]
    with jax.set_mesh(make_mesh(config, devices)), laid_out(config):
        yield


def check(mesh_config, conditions, features=(), implementation="reference", window=13) -> str:
    """Equal to the reference on one device, relative to each result's largest entry; the HLO."""
    mask, options = make_mask(conditions, window), make_options(features, N)
    with on(mesh_config):
        shared, arguments = value_and_gradients(
            across_context(mask, options, implementation), options)
        actual, text = shared(*arguments), shared.lower(*arguments).as_text()

    def attend(q, k, v, sinks):
        return reference_attention(q, k, v, mask, **(options | dict(sinks_N=sinks)))

    whole, _ = value_and_gradients(attend, options)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), actual, whole(*arguments)):
        if b is not None:
            a, b = np.asarray(a), np.asarray(b)
            finite = np.isfinite(b)
            np.testing.assert_array_equal(a[~finite], b[~finite])
            error = np.abs(a[finite] - b[finite]).max() / np.abs(b[finite]).max()
            assert error <= 1e-6, (name, error)
    return text


# Where no place is asked for, keys are met in other pairs: without features too.
PLACELESS = [mask for mask in MASKS if not {"window", "prefix"} & set(mask)]
FEATURES = ("soft_cap", "sinks", "alibi")
CASES = [(mask, FEATURES) for mask in MASKS] + [(mask, ()) for mask in PLACELESS]


@pytest.mark.parametrize("conditions,features", CASES, ids=lambda names: "+".join(names) or "none")
def test_a_ring_knows_every_mask(conditions, features):
    check(RING, conditions, features)


@pytest.mark.parametrize("conditions,window,hops", [
    (("causal", "window"), 1, 0), (("causal", "window", "segments"), 4, 2), (("window",), 5, 4),
])
def test_keys_travel_only_to_where_a_window_shows_something_of_them(conditions, window, hops):
    """Chunks of 3 tokens on 8 devices: a window of 4 reaches the neighbours on either side."""
    eight = MeshConfig(data=1, context=8)
    text = check(eight, conditions, window=window)
    # Keys and values, twice; and with the second time their gradients, until they are home.
    assert text.count("collective_permute") == 6 * hops


@pytest.mark.parametrize("conditions", [
    ("causal", "sparse", "segments"), ("causal", "window", "prefix"), ("window", "segments"),
], ids="+".join)
@pytest.mark.parametrize("mesh", [
    dict(data=2, context=4), dict(data=1, context=2, tensor=4), dict(data=1, context=4, tensor=2),
], ids=lambda mesh: "x".join(map(str, mesh.values())))
def test_heads_for_time_knows_every_mask_and_dropout(conditions, mesh):
    """Key heads that do not divide (2 over 4, 1 over 2) are sent as often as they are needed."""
    mesh = MeshConfig(context_exchange="all_to_all", **mesh)
    check(mesh, conditions, ("soft_cap", "sinks", "alibi", "dropout"))


@pytest.mark.parametrize("chip", ["v6e", "hopper"])
def test_a_kernels_pieces_make_the_whole(chip):
    """What each device of a ring computes, by kernels: two chunks of keys, the second ahead."""
    mask, options = make_mask(("causal", "window", "segments")), make_options(("soft_cap",), N)
    half, interpret = T // 2, True
    if chip == "v6e":
        interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    fixed = Options(options["scale"], options["soft_cap"], 0.0, chip, interpret)

    def pieces(q, k, v):
        for start in (0, half):
            part = dataclasses.replace(
                mask, key_segments_BS=mask.key_segments_BS[:, start:start + half],
                query_offset_B=jnp.full((B,), -start, jnp.int32))
            keys = (x[:, start:start + half] for x in (k, v))
            yield Operands(q, *keys, part, None, None, None)

    @jax.jit
    def merged(q, k, v, g):
        one, other = (attend_piece(fixed, piece) for piece in pieces(q, k, v))
        out, lse = merge(one, other)
        of_all = of_loss(out, lse, (g, jnp.zeros_like(lse)))
        parts = [attend_piece_gradients(fixed, piece, g, *of_all) for piece in pieces(q, k, v)]
        (dq, dk, dv), (dq_other, dk_other, dv_other) = parts
        join = functools.partial(jnp.concatenate, axis=1)
        return out, lse, dq + dq_other, join([dk, dk_other]), join([dv, dv_other])

    def whole(q, k, v, g):
        results, back = jax.vjp(lambda *x: reference_attention(*x, mask, **options), q, k, v)
        return *results, *back((g, jnp.zeros_like(results[1])))

    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]
    assert_close(merged(*arrays), jax.jit(whole)(*arrays), 1e-5)
