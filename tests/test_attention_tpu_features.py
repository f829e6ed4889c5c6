"""The TPU's flash attention, interpreted: its features, dtypes and blocks; nothing races."""

import pytest
from kernel_cases import FEATURES, errors, make_mask
from test_attention_tpu import SHAPE, TOLERANCE, check, kernel

from batiste.pallas_kernels import certified, tpu_plan
from batiste.pallas_kernels.tpu_blocks import Blocks


@pytest.mark.parametrize("conditions", [
    (), ("causal", "window"), ("causal", "prefix"), ("segments",), ("causal", "offset"), ("sparse",),
], ids="+".join)
def test_without_features_and_without_races(conditions, races):
    check(conditions, (), options=kernel(detect_races=True))
    races.check("v6e")


@pytest.mark.parametrize("heads", [(4, 4), (3, 3), (6, 2), (4, 1)])
def test_heads_side_by_side_with_keys_of_their_own_or_shared(heads):
    found = errors(make_mask(("causal",), *SHAPE[:2]), FEATURES, SHAPE, "float32", kernel(), heads)
    assert max(found.values()) < TOLERANCE["float32"], found


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_alone(feature):
    check(("causal",), (feature,), shape=(72, 72, 16))


@pytest.mark.parametrize("dtype", certified.DTYPES)
@pytest.mark.parametrize("head_dim", certified.HEAD_DIMS)
def test_every_certified_dtype_and_head_dim(dtype, head_dim):
    check(("causal",), ("sinks",), shape=(40, 40, head_dim), dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [
    Blocks(32, 64, 32, 32, 8),  # tiles that are not square: no diagonal
    Blocks(64, 64, 16, 16, 16),  # many units: the pipeline's seam, sixteen times
    Blocks(16, 16, 16, 16, 16),  # one unit a tile: no seam
])
def test_block_sizes_change_nothing_not_even_dropout(blocks):
    check(("causal",), ("dropout",), shape=(136, 136, 16), options=kernel(blocks))


@pytest.mark.slow
def test_sequences_that_do_not_fit_into_vmem_are_taken_in_chunks(monkeypatch):
    small = tpu_plan.CHIPS["v6e"]._replace(vmem_bytes=2 * 2**17)
    monkeypatch.setitem(tpu_plan.CHIPS, "v6e", small)
    mask = make_mask(("causal", "segments"), 136, 136)
    for backward in (False, True):
        plan, _ = tpu_plan.make_plan(kernel(), plan_operands(mask, 136), backward)
        assert plan.chunks > 1
    check(("causal", "segments"), ("sinks",), shape=(136, 136, 16))


def plan_operands(mask, length):
    """Operands of which only shapes matter."""
    import jax.numpy as jnp

    from batiste.pallas_kernels.operands import Operands

    q, k = jnp.zeros((2, length, 4, 16)), jnp.zeros((2, length, 2, 16))
    return Operands(q, k, k, mask, None, None, None)
