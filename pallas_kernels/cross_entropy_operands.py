"""What every cross-entropy kernel takes and gives."""

from typing import NamedTuple

import jax


class Options(NamedTuple):
    """What is fixed when a kernel is built; `chip` chooses the kernel and its tiles.

    layout: dims of the head, "DV" or "VD". smoothed: whether `Sums.total_M` is wanted.
    """

    layout: str
    soft_cap: float | None
    smoothed: bool
    chip: str
    interpret: object


class Operands(NamedTuple):
    """The arrays that a kernel reads; the head has x's dtype, and D is a multiple of 128."""

    x_MD: jax.Array
    head: jax.Array
    targets_M: jax.Array

    def vocabulary(self, options: Options) -> int:
        """How many words there are."""
        return self.head.shape[options.layout.index("V")]


class Sums(NamedTuple):
    """What the loss needs to know of each token's soft-capped logits, or the gradients of these.

    log_z_M: log-sum-exp. hit_M: the target's logit. total_M: the sum of all logits, or 0.
    """

    log_z_M: jax.Array
    hit_M: jax.Array
    total_M: jax.Array
