"""The TPU's flash attention, run by Pallas' TPU interpreter, is the reference in value and gradient."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from batiste.pallas_kernels import certified
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


@pytest.mark.parametrize("entry", [
    entry if len(entry.mask) < 3 else pytest.param(entry, marks=pytest.mark.slow) for entry in ENTRIES
], ids=lambda entry: "+".join(entry.mask) or "full")
def test_every_certified_mask_with_all_features(entry):
    check(entry.mask, FEATURES)
