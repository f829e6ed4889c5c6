"""Every certified GPU entry: the reference in value and gradient when interpreted, lowered for CUDA."""

import pytest

from batiste.pallas_kernels import certified
from batiste.pallas_kernels.gpu_blocks import Blocks, Plan
from batiste.pallas_kernels.operands import Options
from kernel_cases import FEATURES, errors, make_mask
from test_attention_tpu_compile import FEATURES as FEATURE_ARRAYS
from test_attention_tpu_compile import compile_attention

ENTRIES = [entry for entry in certified.CERTIFIED if "hopper" in entry.chips]
PLAN = Plan(Blocks(32, 32, 4, 2), Blocks(16, 32, 4, 2), Blocks(32, 16, 4, 2))
TOLERANCE = {"float32": 5e-6, "bfloat16": 2e-2, "float16": 3e-3}


def check(conditions, features, shape, dtype):
    kernel = Options(0.0, None, 0.0, "hopper", True, PLAN)
    found = errors(make_mask(conditions, *shape[:2]), features, shape, dtype, kernel)
    assert max(found.values()) < TOLERANCE[dtype], found


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: "+".join(entry.mask) or "full")
def test_every_certified_mask_with_all_features(entry):
    check(entry.mask, FEATURES, (40, 72, 32), "float32")


@pytest.mark.parametrize("dtype", certified.DTYPES)
@pytest.mark.parametrize("head_dim", certified.HEAD_DIMS)
def test_every_certified_dtype_and_head_dim(dtype, head_dim):
    check(("causal",), ("sinks",), (40, 40, head_dim), dtype)


@pytest.mark.parametrize("chip", certified.GPU_CHIPS)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: "+".join(entry.mask) or "full")
def test_every_certified_mask_lowers(entry, chip):
    compile_attention(chip, entry.mask, FEATURE_ARRAYS, (128, 300, 128))


@pytest.mark.parametrize("chip", certified.GPU_CHIPS)
@pytest.mark.parametrize("dtype", certified.DTYPES)
def test_every_certified_dtype_and_head_dim_lowers(dtype, chip):
    for head_dim in certified.HEAD_DIMS:
        compile_attention(chip, ("causal",), (), (256, 256, head_dim), dtype)
