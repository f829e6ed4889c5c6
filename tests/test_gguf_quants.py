"""What quantized GGUF tensors stand for: blocks packed here by the format, read from a file.

Each case draws quants and scales, packs their bits as ggml's block structures say, and computes the
values from the same quants and scales by the formula of the format. Nothing of the gguf package
takes part but what writes a file around the bytes.
"""

from collections.abc import Callable
from typing import NamedTuple

import gguf
import numpy as np
import pytest
import transformers
from test_gguf import KINDS, SMALL, described, finished

from batiste.interop.gguf_files import QUANTIZED, GGUFile

ROWS, BLOCKS = 3, 2
Random = np.random.Generator


class Packed(NamedTuple):
    """Bytes of blocks [ROWS, BLOCKS, bytes], and the values [ROWS, BLOCKS, weights] they stand for."""

    bytes: np.ndarray
    values: np.ndarray


def draw(random: Random, low: int, high: int, *sizes: int) -> np.ndarray:
    """Whole numbers from low to high, both included, for each block; both occur."""
    drawn = random.integers(low, high + 1, (ROWS, BLOCKS, *sizes))
    drawn[0, 0].flat[:2] = low, high
    return drawn


def half(random: Random) -> np.ndarray:
    """A positive float16 for each block."""
    return random.uniform(0.01, 0.2, (ROWS, BLOCKS, 1)).astype(np.float16)


def together(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=-1)


def nibbles(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return (low | high << 4).astype(np.uint8)


def q8_0(random: Random) -> Packed:
    """d, then 32 signed bytes: d q."""
    d, q = half(random), draw(random, -128, 127, 32)
    return Packed(together(d, q.astype(np.int8)), d.astype(float) * q)


def of_32(bits: int, has_least: bool) -> Callable[[Random], Packed]:
    """d, the least value if there is one, the fifth bits as 32 bits, then nibbles.

    The low nibbles are the first 16 weights. Without a least value, quants count from the middle.
    """
    def pack(random: Random) -> Packed:
        d, least, q = half(random), half(random), draw(random, 0, 2**bits - 1, 32)
        fifth = (q >> 4 << np.arange(32)).sum(axis=-1, keepdims=True).astype("<u4")
        low = q & 15
        parts = [d, *([least] if has_least else []), *([fifth] if bits == 5 else []),
                 nibbles(low[..., :16], low[..., 16:])]
        values = d.astype(float) * (q if has_least else q - 2 ** (bits - 1))
        return Packed(together(*parts), values + least.astype(float) * has_least)

    return pack


def of_256(bits: int) -> Callable[[Random], Packed]:
    """d and d_min, 8 scales and 8 minima of 6 bits in 12 bytes, fifth bits, nibbles.

    d scale q - d_min minimum, in groups of 32. Byte i < 4 has scale i below the upper two bits of
    scale i + 4, byte i + 4 minima likewise, byte i + 8 the lower four bits of scale and minimum
    i + 4. Of each 32 bytes of nibbles the low ones are a group, and the high ones the next. Bit g of
    fifth bits' byte i is that of weight i of group g.
    """
    def pack(random: Random) -> Packed:
        d, d_min = half(random), half(random)
        scales, minima = draw(random, 0, 63, 8), draw(random, 0, 63, 8)
        q = draw(random, 0, 2**bits - 1, 8, 32)
        twelve = np.concatenate([
            scales[..., :4] | scales[..., 4:] >> 4 << 6, minima[..., :4] | minima[..., 4:] >> 4 << 6,
            scales[..., 4:] & 15 | (minima[..., 4:] & 15) << 4], axis=-1).astype(np.uint8)
        fifth = (q >> 4 << np.arange(8)[:, None]).sum(axis=-2).astype(np.uint8)
        low = q & 15
        four = nibbles(low[..., ::2, :], low[..., 1::2, :]).reshape(ROWS, BLOCKS, 128)
        parts = [d, d_min, twelve, *([fifth] if bits == 5 else []), four]
        values = (d.astype(float) * scales)[..., None] * q
        values -= (d_min.astype(float) * minima)[..., None]
        return Packed(together(*parts), values.reshape(ROWS, BLOCKS, 256))

    return pack


def q6_k(random: Random) -> Packed:
    """Low nibbles, upper two bits, 16 signed scales, d: d scale (q - 32), in groups of 16.

    Of each half of 128 weights, 64 bytes have the low nibbles of the first 64 weights, and those of
    the others above them; 32 bytes have the upper bits of the four weights that are 32 apart.
    """
    d, scales = half(random), draw(random, -128, 127, 16)
    q = draw(random, 0, 63, 256)
    halves = q.reshape(ROWS, BLOCKS, 2, 4, 32)
    low = (halves & 15).reshape(ROWS, BLOCKS, 2, 2, 64)
    four = nibbles(low[..., 0, :], low[..., 1, :]).reshape(ROWS, BLOCKS, 128)
    two = (halves >> 4 << 2 * np.arange(4)[:, None]).sum(axis=-2)
    two = two.astype(np.uint8).reshape(ROWS, BLOCKS, 64)
    values = (d.astype(float) * scales)[..., None] * (q - 32).reshape(ROWS, BLOCKS, 16, 16)
    return Packed(together(four, two, scales.astype(np.int8), d), values.reshape(ROWS, BLOCKS, 256))


CASES = {
    "Q8_0": q8_0, "Q4_0": of_32(4, False), "Q4_1": of_32(4, True), "Q5_0": of_32(5, False),
    "Q5_1": of_32(5, True), "Q4_K": of_256(4), "Q5_K": of_256(5), "Q6_K": q6_k,
}


def test_every_quantized_kind_that_is_read_is_here():
    assert set(CASES) == set(QUANTIZED) - {"F32", "F16", "BF16"}


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_read_as_the_values_they_stand_for(name, tmp_path):
    packed, kind = CASES[name](np.random.default_rng(0)), KINDS[name]
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    assert packed.bytes.shape == (ROWS, BLOCKS, size)
    assert packed.values.shape == (ROWS, BLOCKS, weights)
    writer = described(tmp_path / "small.gguf", transformers.LlamaConfig(**SMALL))
    writer.add_tensor("token_embd.weight", packed.bytes.reshape(ROWS, -1), raw_dtype=kind)
    finished(writer)
    found = GGUFile(tmp_path / "small.gguf").read("model.embed_tokens.weight")
    assert found.dtype == np.float32 and np.abs(found).max() > 0.1
    np.testing.assert_allclose(found, packed.values.reshape(ROWS, -1), rtol=1e-5, atol=1e-6)
