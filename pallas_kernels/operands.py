"""What every attention kernel takes."""

from typing import NamedTuple

import jax

from batiste.pallas_kernels.mask import AttentionMask


class Options(NamedTuple):
    """What is fixed when a kernel is built; `chip` chooses the kernel and, unless `blocks` does,
    its block sizes."""

    scale: float
    soft_cap: float | None
    dropout_rate: float
    chip: str
    interpret: object
    blocks: object = None


class Operands(NamedTuple):
    """The arrays that a kernel reads, forward and backward; None is absent."""

    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    mask: AttentionMask
    sinks_N: jax.Array | None
    alibi_slopes_N: jax.Array | None
    dropout_seeds_BN: jax.Array | None
