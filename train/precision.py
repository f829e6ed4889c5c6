"""Dynamic loss scaling for float16, whose smallest normal number is 6.1e-5.

The loss is multiplied by a scale before differentiation so that small gradients do not vanish, and
the gradients are divided by it afterwards. Where they overflowed, the step is dropped and the scale
halved; after a run of good steps it is doubled. Scales are powers of two, so scaling and unscaling
are exact. bfloat16 has the range of float32 and needs none of this.

Source: Micikevicius et al. 2018, Mixed Precision Training (arXiv:1710.03740), section 3.2.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from batiste.fields import Config, check_types


@dataclasses.dataclass
class LossScaleConfig(Config):
    """Where the scale starts, when it grows, and its bounds."""

    # The first scale. A loss is a sum over tokens here, so the gradient at a logit is at most the scale
    # itself, and float16 ends at 65,504. (2^15 is the custom where the loss is a mean.)
    initial: float = 2.0**10
    growth_interval: int = 2000  # good steps in a row before the scale doubles
    minimum: float = 1.0  # where halving ends
    maximum: float = 2.0**24  # where doubling ends

    def validate(self) -> None:
        """Raises ValueError, naming the field, if the scale could not move as documented."""
        check_types(self, "train.loss_scale.")
        for field in ("initial", "minimum", "maximum"):
            value = getattr(self, field)
            if not 0 < value < math.inf or math.frexp(value)[0] != 0.5:
                raise ValueError(f"train.loss_scale.{field}: expected a power of two, got {value}")
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(f"train.loss_scale.initial: expected between minimum {self.minimum} "
                             f"and maximum {self.maximum}, got {self.initial}")
        if self.growth_interval < 1:
            raise ValueError("train.loss_scale.growth_interval: expected >= 1, "
                             f"got {self.growth_interval}")


class LossScale(NamedTuple):
    """Part of the training state: float32 `scale` and int32 `good_steps`, both scalars."""

    scale: jax.Array
    good_steps: jax.Array


def initial_loss_scale(config: LossScaleConfig) -> LossScale:
    """Returns the state of the scale before the first step."""
    config.validate()
    return LossScale(jnp.float32(config.initial), jnp.int32(0))


def unscale(gradients: Any, loss_scale: LossScale) -> Any:
    """Returns the gradients of the unscaled loss, in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) / loss_scale.scale, gradients)


def all_finite(tree: Any) -> jax.Array:
    """Returns a boolean scalar: no leaf holds an infinity or a NaN."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.bool_(True)


def adjust(loss_scale: LossScale, finite: jax.Array, config: LossScaleConfig) -> LossScale:
    """Halves the scale after an overflow, doubles it after `growth_interval` good steps in a row.

    `finite` is a boolean scalar. The scale stays within [minimum, maximum].
    """
    good_steps = jnp.where(finite, loss_scale.good_steps + 1, 0)
    grow = good_steps >= config.growth_interval
    factor = jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5)
    scale = jnp.clip(loss_scale.scale * factor, config.minimum, config.maximum)
    return LossScale(scale, jnp.where(grow, 0, good_steps))


def keep_if(finite: jax.Array, new: Any, old: Any) -> Any:
    """Returns `new` where the boolean scalar `finite` holds and `old`, bit for bit, where not.

    Both are trees of one structure: parameters and optimizer state after and before a step.
    """
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
