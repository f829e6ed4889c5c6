"""An activation: x + sin²(x) (arXiv:2006.08195). --config.model.activation=docs/extend/snake.py:SNAKE"""

import jax
import jax.numpy as jnp

from batiste.models import Activation


def snake(x: jax.Array) -> jax.Array:
    """The function, in float32."""
    return x + jnp.square(jnp.sin(x))


SNAKE = Activation(snake)  # Activation(snake, gated=True) would act on a gate.
