"""An encoder with heads: what each says of a batch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from batiste.models import Beside, Transformer, TransformerConfig
from batiste.models.layers import add_bias, dropout, project
from batiste.models.parameter import matrix, vector
from batiste.sharding import constrain, gather
from batiste.tasks.config import HeadConfig
from batiste.tasks.rows import Rows, TaskBatch

STDDEV = 0.02  # Of BERT's own heads.
IMPOSSIBLE = -1e9


class Head(nnx.Module):
    """A product and a bias: logits in float32."""

    def __init__(self, config: TransformerConfig, outputs: int, *, rngs: nnx.Rngs):
        sizes = config.sizes | {"Y": outputs}
        self.weight_DY = matrix(rngs, "DY", sizes, inputs="D", stddev=STDDEV)
        self.bias_Y = vector("Y", sizes, 0.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        weight_DY = gather(self.weight_DY[...], "DY")
        return add_bias(project(x, weight_DY, (0,), jnp.float32), self.bias_Y)


class TaskModel(nnx.Module):
    """One encoder under all heads; a "similarity" has no parameters of its own."""

    def __init__(
        self, config: TransformerConfig, heads: Sequence[HeadConfig], *, rngs: nnx.Rngs
    ):
        self.encoder = Transformer(config, rngs=rngs)
        self.head_configs = tuple(heads)
        for head in heads:
            outputs = 2 if head.kind == "span" else len(head.classes)
            own = None if head.kind == "similarity" else Head(config, outputs, rngs=rngs)
            setattr(self, f"head_{head.name}", own)

    def __call__(
        self, batch: TaskBatch, dropout_key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """What each head says, float32, by its name.

        logits_BY of "sequence" and "multilabel", logits_BTY of "tags", and of "span" (start, end)
        with IMPOSSIBLE outside the context; of "similarity" both texts' unit vectors, x_B2D.
        """
        rate = self.encoder.config.dropout
        first = second = last = None
        if dropout_key is not None and rate > 0:
            first, second, last = jax.random.split(dropout_key, 3)
        x_BTD, said = hidden(self.encoder, batch.rows, first), {}
        dropped_BTD = dropout(x_BTD, rate, last)
        for head in self.head_configs:
            if head.kind == "similarity":
                pair = (batch.rows, x_BTD), (
                    batch.second, hidden(self.encoder, batch.second, second))
                said[head.name] = jnp.stack([
                    unit(pooled(states_BTD, rows, head.given("pool"))) for rows, states_BTD in pair
                ], axis=1)
                continue
            read = dropped_BTD
            if head.kind in ("sequence", "multilabel"):
                read = pooled(dropped_BTD, batch.rows, head.given("pool"))
            logits = getattr(self, f"head_{head.name}")(read.astype(x_BTD.dtype))
            if head.kind == "span":
                logits = jnp.where(batch.rows.context_BT[:, :, None] > 0, logits, IMPOSSIBLE)
            said[head.name] = logits
        return said


def hidden(
    encoder: Transformer, rows: Rows, dropout_key: jax.Array | None = None
) -> jax.Array:
    """The last states of an encoder, normed as it norms them, x_BTD."""
    tokens_BT, segments_BT, types_BT = (constrain(x_BT, "BS") for x_BT in rows[:3])
    beside = Beside(types_BT=None if encoder.config.token_types is None else types_BT)
    x_BTD, _ = encoder.features(tokens_BT, None, segments_BT, dropout_key, False, beside)
    return x_BTD if encoder.norm is None else encoder.norm(x_BTD)


def pooled(x_BTD: jax.Array, rows: Rows, how: str) -> jax.Array:
    """One vector for each row, float32, of its real tokens: their mean, the first or the last."""
    x_BTD, real_BT = x_BTD.astype(jnp.float32), (rows.segments_BT > 0).astype(jnp.float32)
    if how == "mean":
        count_B = jnp.maximum(real_BT.sum(axis=1), 1)
        return (x_BTD * real_BT[:, :, None]).sum(axis=1) / count_B[:, None]
    if how == "first":
        return x_BTD[:, 0]
    place_B = jnp.maximum(real_BT.sum(axis=1).astype(jnp.int32) - 1, 0)
    return jnp.take_along_axis(x_BTD, place_B[:, None, None], axis=1)[:, 0]


def unit(x_BD: jax.Array) -> jax.Array:
    """The vectors at length 1; a zero stays."""
    norm_B = jnp.sqrt(jnp.maximum(jnp.square(x_BD).sum(axis=1), 1e-24))
    return x_BD / norm_B[:, None]
