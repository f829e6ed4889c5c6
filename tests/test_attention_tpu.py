"""The TPU's flash attention, run by Pallas' TPU interpreter, is the reference in value and gradient."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from batiste.pallas_kernels import certified, tpu_plan
from batiste.pallas_kernels.operands import Options
from batiste.pallas_kernels.tpu_blocks import Blocks
from kernel_cases import FEATURES, errors, make_mask

ENTRIES = [entry for entry in certified.CERTIFIED if "v6e" in entry.chips]
SHAPE = (40, 72, 16)  # Queries, keys, head dim; neither length is a multiple of a tile.
BLOCKS = Blocks(query_tile=32, key_tile=32, query_unit=16, key_unit=32, key_piece=32)
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}


def kernel(blocks=BLOCKS, detect_races=False) -> Options:
    """Options for the interpreter; memory that was not written reads as NaN."""
    interpret = pltpu.InterpretParams(detect_races=detect_races, uninitialized_memory="nan")
    return Options(0.0, None, 0.0, "v6e", interpret, blocks)


def check(conditions, features, shape=SHAPE, dtype="float32", options=None):
    found = errors(make_mask(conditions, *shape[:2]), features, shape, dtype, options or kernel())
    assert max(found.values()) < TOLERANCE[dtype], found


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: "+".join(entry.mask) or "full")
def test_every_certified_mask_with_all_features(entry):
    check(entry.mask, FEATURES)


@pytest.mark.parametrize("conditions", [
    (), ("causal",), ("causal", "window"), ("window",), ("causal", "prefix"), ("segments",),
    ("causal", "offset"), ("sparse",),
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


@pytest.mark.parametrize("blocks", [
    Blocks(32, 64, 32, 32, 8),  # tiles that are not square: no diagonal
    Blocks(64, 64, 16, 16, 16),  # many units: the pipeline's seam, sixteen times
    Blocks(16, 16, 16, 16, 16),  # one unit a tile: no seam
])
def test_block_sizes_change_nothing_not_even_dropout(blocks):
    check(("causal",), ("dropout",), shape=(136, 136, 16), options=kernel(blocks))


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
