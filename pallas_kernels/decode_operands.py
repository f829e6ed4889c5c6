"""What every decoding kernel takes."""

from typing import NamedTuple

import jax


class DecodeOptions(NamedTuple):
    """What is fixed when a kernel is built; `chip` chooses the kernel and its tiles."""

    window: int | None
    scale: float
    soft_cap: float | None
    chip: str
    interpret: object


class DecodeOperands(NamedTuple):
    """The arrays that a kernel reads; alibi_slopes_N is float32, or None.

    first_B, end_B: the keys that each row sees, int32: from the first up to, not including, the
        end, which is one more than the query's own place.
    """

    q_BNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    first_B: jax.Array
    end_B: jax.Array
    alibi_slopes_N: jax.Array | None
