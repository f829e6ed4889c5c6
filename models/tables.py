"""Where tokens become vectors and vectors logits: tables, and heads after the last layer."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from batiste.models.attention_choice import fused_losses
from batiste.models.chunked_loss import Head, Rows, chunked_loss
from batiste.models.config import TransformerConfig
from batiste.models.layers import (
    HeadTransform, Norm, ReplacedHead, add_bias, lookup, project,
)
from batiste.models.parameter import matrix, vector
from batiste.models.positions import RELATIVE_BUCKETS, relative_bias, sinusoids
from batiste.models.token_loss import LossRules
from batiste.pallas_kernels import AttentionMask
from batiste.sharding import constrain, gather


def relative_table(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.Param:
    """A bias for each head and bucket of distances, which all layers of a stack share."""
    buckets = config.sizes | {"P": RELATIVE_BUCKETS}
    return matrix(rngs, "PN", buckets, inputs="P", stddev=config.init_stddev)


class Tables(nnx.Module):
    """What is before the first layer of a model and after the last; the model is one."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        sizes, stddev = config.sizes, config.init_stddev
        self.width = "D" if config.embedding_dim is None else "R"
        two, learned = config.form == "encoder_decoder", config.positions == "learned"
        for name, rows, wanted in (
            ("embedding", "V", True), ("position", "T", learned),
            ("encoder_position", "T", two and learned),
            ("type", "P", config.token_types is not None),
        ):
            table = functools.partial(matrix, inputs=self.width, stddev=stddev)
            letters = rows + self.width
            setattr(self, f"{name}_{letters}", table(rngs, letters, sizes) if wanted else None)
        normed = config.embedding_norm
        self.embedding_norm = Norm(config, self.width) if normed else None
        self.encoder_embedding_norm = Norm(config, self.width) if normed and two else None
        factored = self.width == "R"
        self.widening_RD = (
            matrix(rngs, "RD", sizes, inputs="R", stddev=stddev) if factored else None)
        has_bias = factored and config.bias == "all"
        self.widening_bias_D = vector("D", sizes, 0.0) if has_bias else None
        relative = config.positions == "relative"
        self.relative_PN = relative_table(config, rngs) if relative else None
        self.norm = Norm(config) if config.norm_placement != "post" else None

    def add_heads(self, rngs: nnx.Rngs) -> None:
        """The parameters after the last layer, which are drawn after those of the layers."""
        config = self.config
        self.head_transform = HeadTransform(config, rngs=rngs) if config.head_transform else None
        self.replaced_head = ReplacedHead(config, rngs=rngs) if config.discriminator else None
        untied = functools.partial(matrix, inputs="D", stddev=config.init_stddev)
        self.head_DV = None if config.tied_embeddings else untied(rngs, "DV", config.sizes)

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array, types_BT=None, side: str = ""):
        """What enters a stack, x_BTD; side: "encoder_" for the one that reads the source."""
        x_BTD = self.looked_up(tokens_BT, positions_BT, types_BT, side)
        if self.widening_RD is None:
            return x_BTD
        x_BTD = project(x_BTD, gather(self.widening_RD[...], "RD"))
        return add_bias(x_BTD, self.widening_bias_D)

    def looked_up(self, tokens_BT, positions_BT, types_BT=None, side: str = ""):
        """The same as wide as the tables, in the compute dtype."""
        config = self.config
        x_BTD = self._rows_of("embedding", "V", tokens_BT)
        if config.scale_embeddings:
            # In the compute dtype, as Gemma was trained: 55.5 and not 55.43 in bf16.
            x_BTD *= jnp.sqrt(float(config.model_dim)).astype(config.dtype).astype(jnp.float32)
        if config.positions == "learned":
            x_BTD += self._rows_of(f"{side}position", "T", positions_BT)
        elif config.positions == "sinusoidal":
            x_BTD += sinusoids(positions_BT, config.sizes[self.width])
        if config.token_types is not None:
            types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
            x_BTD += self._rows_of("type", "P", types_BT)
        if config.embedding_norm:
            x_BTD = getattr(self, f"{side}embedding_norm")(x_BTD)
        return x_BTD.astype(config.dtype)

    def _rows_of(self, name: str, rows: str, places_BT: jax.Array) -> jax.Array:
        """The rows of a table at these places, as wide as what is embedded."""
        letters = rows + self.width
        return lookup(gather(getattr(self, f"{name}_{letters}")[...], letters), places_BT, letters)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The head, in float32 from the product on; soft-capped if the config says so.

        Raises ValueError for a discriminator, which has none.
        """
        if self.replaced_head is not None:
            raise ValueError(
                "model.discriminator=True has no logits of tokens, but says which were replaced: "
                "leave it False to predict tokens")
        return self.products(self._normed(x_BTD), self.head_transform)

    def replaced_odds(self, x_BTD: jax.Array) -> jax.Array:
        """A discriminator's logarithm of the odds that a token was replaced, float32 BT."""
        x_BTD = constrain(x_BTD if self.norm is None else self.norm(x_BTD), "BTD")
        return constrain(self.replaced_head(x_BTD), "BT")

    def products(self, x_BTD: jax.Array, transform: HeadTransform | None) -> jax.Array:
        """What a head makes of normed features, and of the transform's bias if it has one."""
        x_BTD, head = constrain(x_BTD, "BTD"), self._head()
        table, summed = gather(head.weight, head.letters), 1 - head.letters.index("V")
        logits_BTV = constrain(project(x_BTD, table, (summed,), jnp.float32), "BTV")
        if transform is not None:
            logits_BTV += transform.bias_V[...][None, None]
        cap = head.soft_cap
        return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)

    def chunked_loss(
        self, rows: Rows, scale: jax.Array | None, rules: LossRules, chunk: int
    ) -> tuple[jax.Array, jax.Array]:
        """The loss of features and each row's cross-entropy, without all logits: `chunked_loss`."""
        # As much memory as the features: what the norm computes in fp32 is not kept.
        x_BTD = jax.checkpoint(self._normed)(rows.x_BTD)
        return chunked_loss(rows._replace(x_BTD=x_BTD), self._head(), scale, rules, chunk)

    def fused_losses(
        self, x_BTD: jax.Array, targets_BT: jax.Array, rules: LossRules
    ) -> tuple[jax.Array, jax.Array]:
        """Loss and cross-entropy of each token by the chip's kernel, float32 BT, without logits.

        Raises ValueError for a model that is not set to a chip's kernels.
        """
        head = self._head()
        whole = gather(head.weight, head.letters)
        options = dict(layout=head.letters, soft_cap=head.soft_cap, **rules._asdict())
        return fused_losses(
            self.config.attention, self._normed(x_BTD), whole, targets_BT, options)

    def _normed(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
        if self.config.scale_logits:
            scaled_BTD = x_BTD.astype(jnp.float32) * self.config.model_dim**-0.5
            x_BTD = scaled_BTD.astype(x_BTD.dtype)
        return x_BTD if self.head_transform is None else self.head_transform(x_BTD)

    def _head(self) -> Head:
        if self.head_DV is not None:
            return Head(self.head_DV[...], "DV", self.config.logit_soft_cap)
        letters = "V" + self.width
        table = getattr(self, f"embedding_{letters}")
        return Head(table[...], letters, self.config.logit_soft_cap)

    def bias(self, config, table_PN, mask: AttentionMask, sizes: tuple) -> jax.Array | None:
        """The relative bias of a stack, for all of its layers; None for other positions."""
        if table_PN is None:
            return None
        return relative_bias(config, gather(table_PN[...], "PN"), mask.distance_BTS(*sizes))
