"""The fused cross-entropy equals the formula, forward and backward, on every certified chip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import GPU, TPU, assert_close, compile_for, interpreter

from batiste.models import LossRules, token_losses, vocabulary_sums
from batiste.pallas_kernels.cross_entropy import (
    CERTIFIED, fused_cross_entropy, reference_cross_entropy,
)

VALUES = {"soft_cap": 3.0, "z_loss": 0.1, "label_smoothing": 0.2}
NONE = {"soft_cap": None, "z_loss": 0.0, "label_smoothing": 0.0}
TOLERANCE = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1.5e-2}
# Two tiles of tokens and two or three of words on TPUs, and more on GPUs, whose tiles are small.
# 1277 words, nearly whole vectors, are read as they are in the layout DV too; most others as VD.
SIZES = {chip: (600, 1277) for chip in TPU} | {chip: (130, 300) for chip in GPU}
SIZES["v6e"] = (1100, 1100)


def features(*names):
    return NONE | {name: VALUES[name] for name in names}


def operands(layout, size, dtype, head_dtype=None, stretch=2.0):
    M, D, V = size
    random = np.random.default_rng(0)
    x_MD = jnp.asarray(random.normal(size=(M, D)), dtype)
    shape = [{"D": D, "V": V}[letter] for letter in layout]
    head = jnp.asarray(stretch / np.sqrt(D) * random.normal(size=shape), head_dtype or dtype)
    return x_MD, head, jnp.asarray(random.integers(0, V, M), jnp.int32)


def results(function, arrays, **options):
    """Both losses, and the gradients of a mixture of them."""
    x_MD, head, targets_M = arrays
    weights_2M = np.random.default_rng(1).normal(size=(2, x_MD.shape[0])).astype(np.float32)

    @jax.jit
    def run(x_MD, head):
        losses, pull = jax.vjp(lambda x, h: function(x, h, targets_M, **options), x_MD, head)
        return losses, pull(tuple(jnp.asarray(weights_2M)))

    return run(x_MD, head)


def check(chip, layout, arrays, options, tolerance):
    options = {"layout": layout, **options}
    where = {"chip": chip, "interpret": interpreter(chip)}
    actual = results(fused_cross_entropy, arrays, **where, **options)
    x_MD, head, targets_M = arrays
    assert [g.dtype for g in actual[1]] == [x_MD.dtype, head.dtype]
    exact = (x_MD.astype(jnp.float32), head.astype(x_MD.dtype).astype(jnp.float32), targets_M)
    assert_close(actual, results(reference_cross_entropy, exact, **options), tolerance)


@pytest.mark.parametrize("layout,names", [
    ("DV", ()), ("VD", ()), ("DV", ("soft_cap",)), ("VD", ("z_loss",)),
    ("VD", ("label_smoothing",)), ("DV", tuple(VALUES)), ("VD", tuple(VALUES)),
])
@pytest.mark.parametrize("chip", ["v5e", "hopper"])
def test_every_feature_and_layout(chip, layout, names, races):
    M, V = SIZES[chip]
    check(chip, layout, operands(layout, (M, 128, V), "float32"), features(*names), 3e-6)
    races.check(chip)


@pytest.mark.parametrize("entry", CERTIFIED, ids=lambda entry: entry.chip)
def test_every_dtype_on_every_chip(entry, races):
    M, V = SIZES[entry.chip]
    # v5p, v6e and tpu7x run v5e's kernels with tiles of their own: there one dtype is enough.
    dtypes = entry.dtypes if entry.chip in ("v5e", *GPU) else entry.dtypes[:1]
    for dtype, layout in zip(dtypes, ("VD", "DV", "VD")):
        # 200 is padded to 256; the head may be wider than x, as parameters are.
        arrays = operands(layout, (M, 200, V), dtype, "float32" if dtype == "bfloat16" else dtype)
        check(entry.chip, layout, arrays, features(*entry.features), TOLERANCE[dtype])
    races.check(entry.chip)


@pytest.mark.parametrize("chip,size", [
    ("v5e", (1, 24, 37)), ("v5e", (256, 1152, 1024)),
    ("ampere", (1, 24, 37)), ("ampere", (64, 256, 128)), ("hopper", (64, 24, 2500)),
])
def test_sizes_below_a_tile_of_whole_tiles_and_of_two_splits(chip, size, races):
    check(chip, "DV", operands("DV", size, "float32"), features(*VALUES), 3e-6)
    races.check(chip)


@pytest.mark.parametrize("chip", ["v5e", "hopper"])
def test_logits_of_hundreds_do_not_overflow(chip):
    arrays = operands("VD", (70, 128, 700), "float32", stretch=200.0)
    check(chip, "VD", arrays, NONE, 1e-4)


@pytest.mark.parametrize("chip", ["v5e", "hopper"])
def test_it_is_the_loss_of_the_objective(chip):
    x_MD, head_DV, targets_M = operands("DV", (40, 72, 300), "float32")
    logits_MV = 3.0 * jnp.tanh(x_MD @ head_DV / 3.0)
    sums = vocabulary_sums(logits_MV[None], targets_M[None])
    expected = token_losses(sums, LossRules(label_smoothing=0.2, z_loss=0.1))
    actual = fused_cross_entropy(
        x_MD, head_DV, targets_M, layout="DV", chip=chip, interpret=interpreter(chip), **VALUES
    )
    assert_close(actual, tuple(loss_BT[0] for loss_BT in expected), 3e-6)


def compiled(chip, layout, size, dtype, head_dtype, options):
    M, D, V = size

    def loss(x_MD, head, targets_M):
        where = {"layout": layout, "chip": chip}
        return fused_cross_entropy(x_MD, head, targets_M, **where, **options)[0].sum()

    shape = tuple({"D": D, "V": V}[letter] for letter in layout)
    step = jax.value_and_grad(loss, argnums=(0, 1))
    return compile_for(chip, step, ((M, D), dtype), (shape, head_dtype), ((M,), "int32"))


@pytest.mark.parametrize("entry", CERTIFIED, ids=lambda entry: entry.chip)
def test_every_feature_and_dtype_compiles(entry):
    size = (100, 128, 381)
    single = [(name,) for name in entry.features]
    for names, layout in zip([(), *single], ("VD", "DV") * 2, strict=True):
        compiled(entry.chip, layout, size, "bfloat16", "float32", features(*names))
    for dtype in entry.dtypes:
        compiled(entry.chip, "VD", size, dtype, dtype, features(*entry.features))


@pytest.mark.parametrize("dtype,layout", [("bfloat16", "VD"), ("float32", "DV")])
@pytest.mark.parametrize("entry", CERTIFIED, ids=lambda entry: entry.chip)
def test_the_largest_sizes_compile_and_hold_no_logits(entry, dtype, layout):
    # An fp32 head and its gradient take 16 GiB, more than a v5e has.
    V = entry.vocabulary // (2 if dtype == "float32" and entry.chip == "v5e" else 1) - 1
    M = 4096
    step = compiled(entry.chip, layout, (M, entry.model_dim, V), dtype, dtype, features(*VALUES))
    if entry.chip in TPU:
        assert step.memory_analysis().temp_size_in_bytes < M * V * 4 / 100


# What XLA's layouts depend on is the same on all TPUs: one of the others is enough.
@pytest.mark.parametrize("chip,layout,V", [
    ("v5e", "VD", 50257), ("v5e", "DV", 50257), ("v5e", "DV", 50304), ("v5e", "DV", 50300),
    ("tpu7x", "DV", 50257),
])
def test_a_head_is_only_copied_to_cast_it(chip, layout, V):
    M, D = 128, 768
    step = compiled(chip, layout, (M, D, V), "bfloat16", "float32", NONE)
    assert step.memory_analysis().temp_size_in_bytes < 1.1 * V * D * 2


@pytest.mark.parametrize("change,message", [
    ({"chip": "v4"}, "certified are v5e, v5p, v6e, tpu7x, hopper, ampere"),
    ({"layout": "VN"}, "certified are DV and VD"),
    ({"layout": "DV"}, "D=128, the head in layout DV has D=300"),
    ({"dtype": "float64"}, "certified are bfloat16, float16, float32"),
    ({"D": 8320}, "model dim 8320 on v5e: certified up to 8192"),
    ({"V": 262145}, "vocabulary 262145 on v5e: certified up to 262144"),
])
def test_what_is_not_certified_is_refused(change, message):
    given = {"chip": "v5e", "layout": "VD", "dtype": "float32", "D": 128, "V": 300} | change
    M, D, V = 8, given["D"], given["V"]
    with jax.enable_x64(True), pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda x, h, t: fused_cross_entropy(
                x, h, t, layout=given["layout"], chip=given["chip"], **NONE
            ),
            *(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
                ((M, D), given["dtype"]), ((V, D), "float32"), ((M,), "int32")
            )),
        )
