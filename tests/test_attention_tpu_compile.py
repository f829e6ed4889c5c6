"""Every certified TPU entry compiles, forward and backward, for every chip: the compiler is here."""

import jax
import jax.numpy as jnp
import pytest

from batiste.pallas_kernels import AttentionMask, BlockSparsity, certified, flash_attention
from kernel_checks import compile_for

ENTRIES = [entry for entry in certified.CERTIFIED if "v6e" in entry.chips]
FEATURES = ("sinks", "slopes", "seeds")
# All four are compiled for; three of them slowly.
CHIPS = [chip if chip == "v6e" else pytest.param(chip, marks=pytest.mark.slow)
         for chip in certified.TPU_CHIPS]


def compile_attention(chip, conditions, features, shape, dtype="bfloat16"):
    """Value and gradients of 4 query heads on 2 key heads; shape is T, S, H."""
    T, S, H = shape
    shapes = {"q": ((1, T, 4, H), dtype), "k": ((1, S, 2, H), dtype), "v": ((1, S, 2, H), dtype)}
    if "segments" in conditions:
        shapes |= {"query_segments_BT": ((1, T), "int32"), "key_segments_BS": ((1, S), "int32")}
    for name in ("prefix", "offset"):
        if name in conditions:
            field = "prefix_B" if name == "prefix" else "query_offset_B"
            shapes[field] = ((1,), "int32")
    of_features = {"sinks": ((4,), "float32"), "slopes": ((4,), "float32"), "seeds": ((1, 4), "int32")}
    shapes |= {name: of_features[name] for name in features}

    def gradients(*arrays):
        given = dict(zip(shapes, arrays))
        mask = AttentionMask(
            causal="causal" in conditions,
            window=S // 3 if "window" in conditions else None,
            sparsity=BlockSparsity(64, 2, 1, 1) if "sparse" in conditions else None,
            **{name: array for name, array in given.items() if name.endswith(("_B", "_BT", "_BS"))},
        )

        def loss(q, k, v):
            out, lse = flash_attention(
                q, k, v, mask, scale=0.1, soft_cap=30.0 if features else None,
                sinks_N=given.get("sinks"), alibi_slopes_N=given.get("slopes"),
                dropout_rate=0.1 if features else 0.0, dropout_seeds_BN=given.get("seeds"), chip=chip,
            )
            return out.astype(jnp.float32).sum() + lse.sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(given["q"], given["k"], given["v"])

    return compile_for(chip, gradients, *shapes.values())


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: "+".join(entry.mask) or "full")
def test_every_certified_mask_with_all_features(entry, chip):
    # One tile of queries by three of keys: small, and every kind of tile is in the program.
    compile_attention(chip, entry.mask, FEATURES, (128, 300, 128))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", certified.DTYPES)
def test_every_certified_dtype_and_head_dim(dtype, chip):
    for head_dim in certified.HEAD_DIMS:
        compile_attention(chip, ("causal",), (), (256, 256, head_dim), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("chip", certified.TPU_CHIPS)
def test_the_tables_blocks_fit_into_vmem_at_sixteen_thousand_tokens(chip):
    program = compile_attention(chip, ("causal", "segments"), (), (16384, 16384, 128))
    assert "flash_forward" in program.as_text() and "flash_backward" in program.as_text()
