"""The small encoder that replaces hidden tokens for a discriminator to find (arXiv:2003.10555)."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from batiste.models.attention import Given
from batiste.models.block import split_time, whole_time
from batiste.models.config import TransformerConfig
from batiste.models.layers import HeadTransform, Norm, add_bias, dropout, project
from batiste.models.parameter import gathered, matrix, vector
from batiste.models.parts import LAYER_KINDS
from batiste.models.pipeline import Layers
from batiste.models.stack import rotations, scan_pattern, stacked
from batiste.pallas_kernels import AttentionMask
from batiste.sharding import gather

PARTS = ("generator", "discriminator")
TABLES = ("embedding_V", "position_T", "type_P")


class Generator(nnx.Module):
    """Layers and a head of its own; it reads and writes through the tables of the discriminator.

    config: `TransformerConfig.generator` of the discriminator's.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        sizes, stddev, self.config = config.sizes, config.init_stddev, config
        widens = config.embedding_dim is not None
        self.widening_RD = matrix(rngs, "RD", sizes, inputs="R", stddev=stddev) if widens else None
        has_bias = widens and config.bias == "all"
        self.widening_bias_D = vector("D", sizes, 0.0) if has_bias else None
        self.layers = stacked(config, config.num_layers, rngs)
        self.norm = Norm(config) if config.norm_placement != "post" else None
        self.head_transform = HeadTransform(config, rngs=rngs)

    def __call__(
        self, x_BTR: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """What is to be multiplied with the table of embeddings, of what was looked up there."""
        config, embed_key, keys = self.config, None, None
        if dropout_key is not None and config.dropout > 0:
            embed_key, layers_key = jax.random.split(dropout_key)
            keys = jax.random.split(layers_key, config.num_layers)
        x_BTD = x_BTR
        if self.widening_RD is not None:
            x_BTD = project(x_BTR, gather(self.widening_RD[...], "RD"))
            x_BTD = add_bias(x_BTD, self.widening_bias_D)
        x_BTD = dropout(split_time(x_BTD, None), config.dropout, embed_key)
        mask = AttentionMask(
            causal=False, query_segments_BT=segments_BT, key_segments_BS=segments_BT)
        masks = {kind: LAYER_KINDS[kind](mask, config) for kind in config.layer_pattern}
        turns, (graphdef, weights) = rotations(config, positions_BT), nnx.split(self.layers)

        def apply(kind, x_BTD, layer):
            block = nnx.merge(graphdef, gathered(layer.weights))
            return block(x_BTD, masks[kind], Given(turns[kind]), None, layer.keys, False)

        x_BTD, _ = scan_pattern(config, config.layer_pattern, apply, x_BTD, Layers(weights, keys))
        x_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
        return self.head_transform(whole_time(x_BTD, None))


def alone(config: TransformerConfig, params: dict[str, Any], part: str) -> tuple:
    """The config and the parameters of one part of a model, of PARTS, as a model of its own."""
    others = {name: value for name, value in params.items() if name != "generator"}
    if part == "discriminator":
        return dataclasses.replace(config, generator_heads=None), others
    config = config.generator
    width = "D" if config.embedding_dim is None else "R"
    tables = {name[:-1] + width: value for name, value in others.items()
              if name[:-1] in TABLES}
    if "embedding_norm" in others:
        tables["embedding_norm"] = {
            name[:-1] + width: value for name, value in others["embedding_norm"].items()}
    return config, params["generator"] | tables

