"""How the cross-entropy kernels for TPUs tile: a table, and what fits in VMEM."""

from typing import Any, NamedTuple

from jax.experimental import pallas as pl

from batiste.pallas_kernels.cross_entropy_operands import Operands, Options

LANES = 128


class Generation(NamedTuple):
    """MiB of VMEM a kernel may plan for, and the tile it starts from: `tokens` x `words`."""

    vmem: int
    tokens: int
    words: int


# VMEM is 128 MiB on v5e and v6e, and 64 MiB a core on v5p and tpu7x.
GENERATIONS = {
    "v5e": Generation(vmem=96, tokens=512, words=1024),
    "v5p": Generation(vmem=48, tokens=512, words=1024),
    "v6e": Generation(vmem=96, tokens=1024, words=1024),
    "tpu7x": Generation(vmem=48, tokens=512, words=1024),
}


class Plan(NamedTuple):
    """One kernel: its tile, whether tokens stay while words stream, and what it computes."""

    tokens: int
    words: int
    tokens_stay: bool
    vocabulary: int
    options: Options

    @property
    def ragged(self) -> bool:
        """Whether the last tile reaches beyond the vocabulary, where anything may be read."""
        return self.vocabulary % self.words != 0

    def axis(self, letter: str) -> int:
        """Which dim of the head is D, or V."""
        return self.options.layout.index(letter)

    def words_by(self, chunk: Any) -> tuple:
        """The index of all words by a chunk of D in the head's tile."""
        return (slice(None), chunk) if self.options.layout == "VD" else (chunk, slice(None))


def plan_tiles(options: Options, operands: Operands, tokens_stay: bool, output_bytes: int) -> Plan:
    """The largest tile that fits: what streams shrinks to 256 first, for it costs no bandwidth."""
    M, D = operands.x_MD.shape
    vocabulary = operands.vocabulary(options)
    generation = GENERATIONS[options.chip]
    tokens = _lanes(pl.cdiv(M, pl.cdiv(M, generation.tokens)))  # 520 is 384 twice, not 512 twice.
    # An fp32 product takes six passes: unrolled over the whole tile it compiled for half a minute.
    most = generation.words * 2 // operands.x_MD.dtype.itemsize
    words = min(most, _lanes(vocabulary))
    while _vmem(operands, (tokens, words), tokens_stay, output_bytes) > generation.vmem * 2**20:
        stays, streams = (tokens, words) if tokens_stay else (words, tokens)
        if streams > 256 or stays <= LANES:
            streams = _lanes(streams // 2)
        else:
            stays = _lanes(stays // 2)
        tokens, words = (stays, streams) if tokens_stay else (streams, stays)
    return Plan(tokens, words, tokens_stay, vocabulary, options)


def _vmem(operands: Operands, tile: tuple, tokens_stay: bool, output_bytes: int) -> int:
    """Bytes a kernel needs: two buffers for each tile in HBM, three or so fp32 tiles of logits."""
    D, itemsize = operands.x_MD.shape[1], operands.x_MD.dtype.itemsize
    tokens, words = tile
    total = 2 * (tokens + words) * D * itemsize + 3 * tokens * words * 4
    if output_bytes:  # An fp32 accumulator, and two buffers of output.
        total += (tokens if tokens_stay else words) * D * (4 + 2 * output_bytes)
    return total


def _lanes(size: int) -> int:
    """Rounded up to whole vectors."""
    return pl.cdiv(size, LANES) * LANES
