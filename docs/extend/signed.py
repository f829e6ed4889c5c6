"""An optimizer: the sign of a momentum. --config.train.optimizer.kind=docs/extend/signed.py:signed"""

import jax
import jax.numpy as jnp
import optax

from batiste.train.optimizer import OptimizerConfig


def signed(config: OptimizerConfig) -> optax.GradientTransformation:
    """What makes updates of clipped gradients; decay, multipliers and schedule come after it."""
    sign = optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates))
    return optax.chain(optax.trace(config.momentum), sign)
