"""Encoder-decoders: T5 of both versions, BART, and the 2017 Transformer, which is Marian's."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from batiste.data.json_files import shown
from batiste.interop.encoders import activation_field
from batiste.interop.family import Family, Field
from batiste.interop.layout import Row, biased, row
from batiste.models import TransformerConfig

SIDES = {"encoder": "encoder_layers/", "decoder": "layers/"}


def _tied(theirs: Mapping) -> bool:
    """Whether its logits are of the tokens' table, and scaled: version 1.0, and not 1.1.

    `scale_decoder_outputs` is what newer files have in place of the flag as it was meant.
    """
    scaled, tied = theirs.get("scale_decoder_outputs"), theirs.get("tie_word_embeddings")
    return (tied is not False) if scaled is None else scaled


def _t5_layers(side: str) -> tuple[Row, ...]:
    prefix, ours = f"{side}.block.{{layer}}.layer.", SIDES[side]
    kinds = [("0.SelfAttention", "attention"), ("1.EncDecAttention", "cross_attention")]
    last = 1 if side == "encoder" else 2
    rows = []
    for theirs, name in kinds[:last]:
        norm = "cross_norm" if name == "cross_attention" else "attention_norm"
        rows += [
            row(f"{prefix}{theirs}.q.weight", f"{ours}{name}/query_DNH", "(NH)D"),
            row(f"{prefix}{theirs}.k.weight", f"{ours}{name}/key_DKH", "(KH)D"),
            row(f"{prefix}{theirs}.v.weight", f"{ours}{name}/value_DKH", "(KH)D"),
            row(f"{prefix}{theirs}.o.weight", f"{ours}{name}/out_NHD", "D(NH)"),
            row(f"{prefix}{theirs[0]}.layer_norm.weight", f"{ours}{norm}/scale_D", "D"),
        ]
    feed = f"{prefix}{last}.DenseReluDense."
    return (
        *rows,
        row(feed + "wi.weight", ours + "feed_forward/up_DF", "FD", gated=False),
        row(feed + "wi_0.weight", ours + "feed_forward/gate_DF", "FD"),
        row(feed + "wi_1.weight", ours + "feed_forward/up_DF", "FD", gated=True),
        row(feed + "wo.weight", ours + "feed_forward/down_FD", "DF"),
        row(f"{prefix}{last}.layer_norm.weight", ours + "feed_forward_norm/scale_D", "D"),
    )


T5_ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu"}
# What follows from the name, and is written beside it.
T5_DERIVED = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True)}


def _t5_activation(theirs: Mapping) -> str:
    name = theirs["feed_forward_proj"]
    if name not in T5_ACTIVATIONS:
        raise ValueError(f"config.json: feed_forward_proj={shown(name)}: expected one of "
                         f"{', '.join(T5_ACTIVATIONS)}")
    for key, value in zip(("dense_act_fn", "is_gated_act"), T5_DERIVED[name], strict=True):
        if theirs.get(key, value) != value:
            raise ValueError(f"config.json: {key}={shown(theirs[key])}: expected {value!r}, as "
                             f"feed_forward_proj={name!r}")
    return T5_ACTIVATIONS[name]


def _t5_also(model: TransformerConfig) -> dict[str, Any]:
    name = {ours: theirs for theirs, ours in T5_ACTIVATIONS.items()}.get(model.activation)
    derived = {} if name is None else dict(
        zip(("dense_act_fn", "is_gated_act"), T5_DERIVED[name], strict=True))
    return derived | {
        "feed_forward_proj": name or "relu", "tie_word_embeddings": model.tied_embeddings,
        "scale_decoder_outputs": model.tied_embeddings, "is_encoder_decoder": True}


BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
T5 = Family(
    "t5", "T5ForConditionalGeneration",
    (row("shared.weight", "embedding_VD", "VD"), row("lm_head.weight", "head_DV", "VD"),
     row("encoder." + BIAS, "encoder_relative_PN", "PN"),
     row("decoder." + BIAS, "relative_PN", "PN"),
     row("encoder.final_layer_norm.weight", "encoder_norm/scale_D", "D"),
     row("decoder.final_layer_norm.weight", "norm/scale_D", "D"),
     *_t5_layers("encoder"), *_t5_layers("decoder")),
    (Field("vocab_size", "vocab_size"), Field("num_layers", "encoder_layers"),
     Field("num_decoder_layers", "num_layers", lambda theirs: theirs["num_layers"]),
     Field("d_model", "model_dim"), Field("num_heads", "num_heads"),
     Field(None, "num_kv_heads", lambda theirs: theirs["num_heads"]),
     Field("d_kv", "head_dim"), Field("d_ff", "mlp_dim"),
     # Its distances have no end; this many tokens it was trained on.
     Field("n_positions", "max_length", 512),
     Field("layer_norm_epsilon", "norm_epsilon"), Field(None, "activation", _t5_activation),
     Field(None, "tied_embeddings", _tied), Field(None, "scale_logits", _tied)),
    fixed={"form": "encoder_decoder", "positions": "relative", "attention_scale": 1.0},
    required={"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    repeated=("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    also=_t5_also,
)


def _bart_attention(theirs: str, ours: str, norm: str) -> tuple[Row, ...]:
    return (
        *biased(theirs + ".q_proj", ours + "query_DNH", "(NH)D"),
        *biased(theirs + ".k_proj", ours + "key_DKH", "(KH)D"),
        *biased(theirs + ".v_proj", ours + "value_DKH", "(KH)D"),
        *biased(theirs + ".out_proj", ours + "out_NHD", "D(NH)"),
        *biased(theirs + "_layer_norm", norm + "/scale_D", "D"),
    )


def _bart_side(side: str) -> tuple[Row, ...]:
    top, ours = f"model.{side}.", SIDES[side]
    layer = top + "layers.{layer}."
    cross = _bart_attention(
        layer + "encoder_attn", ours + "cross_attention/", ours + "cross_post_norm")
    return (
        *_bart_attention(layer + "self_attn", ours + "attention/", ours + "attention_post_norm"),
        *(cross if side == "decoder" else ()),
        *biased(layer + "fc1", ours + "feed_forward/up_DF", "FD"),
        *biased(layer + "fc2", ours + "feed_forward/down_FD", "DF"),
        *biased(layer + "final_layer_norm", ours + "feed_forward_post_norm/scale_D", "D"),
    )


def _bart_tables(side: str) -> tuple[Row, ...]:
    top, table = f"model.{side}.", "encoder_" if side == "encoder" else ""
    return (
        # Its places begin at 2: the first two rows are never a token's.
        row(top + "embed_positions.weight", table + "position_TD", "TD", skipped=2),
        *biased(top + "layernorm_embedding", table + "embedding_norm/scale_D", "D"),
    )


def _of_both_sides(theirs: Mapping) -> int:
    """The heads of the decoder, which must be the encoder's, like the feed-forwards' sizes."""
    for name in ("attention_heads", "ffn_dim"):
        sizes = theirs[f"encoder_{name}"], theirs[f"decoder_{name}"]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"config.json: encoder_{name}={sizes[0]}, decoder_{name}={sizes[1]}: expected the "
                "same of both, as model.form='encoder_decoder' has it"
            )
    return theirs["decoder_attention_heads"]


def _one_vocabulary(theirs: Mapping) -> int:
    """The vocabulary of both sides, whose embeddings are one table."""
    sizes = theirs["vocab_size"], theirs["decoder_vocab_size"]
    if sizes[1] not in (None, sizes[0]):
        raise ValueError(f"config.json: vocab_size={sizes[0]}, decoder_vocab_size={sizes[1]}: "
                         "expected the same of both")
    return sizes[0]


def _bart_sides(model: TransformerConfig) -> dict[str, int | bool]:
    return {"encoder_attention_heads": model.num_heads, "encoder_ffn_dim": model.mlp_dim,
            "is_encoder_decoder": True}


BART = Family(
    "bart", "BartForConditionalGeneration",
    (row("model.shared.weight", "embedding_VD", "VD"),
     *_bart_tables("encoder"), *_bart_tables("decoder"),
     *_bart_side("encoder"), *_bart_side("decoder")),
    (Field("vocab_size", "vocab_size"), Field("encoder_layers", "encoder_layers"),
     Field("decoder_layers", "num_layers"), Field("d_model", "model_dim"),
     Field("decoder_attention_heads", "num_heads"), Field(None, "num_kv_heads", _of_both_sides),
     Field(None, "head_dim", lambda theirs: theirs["d_model"] // theirs["decoder_attention_heads"]),
     Field("decoder_ffn_dim", "mlp_dim"), Field("max_position_embeddings", "max_length"),
     activation_field("activation_function")),
    fixed={"form": "encoder_decoder", "norm": "layer", "norm_placement": "post", "bias": "all",
           "positions": "learned", "embedding_norm": True, "norm_epsilon": 1e-5},
    required={"scale_embedding": False, "tie_word_embeddings": True},
    repeated=("lm_head.weight", "model.encoder.embed_tokens.weight",
              "model.decoder.embed_tokens.weight"),
    aside=("final_logits_bias",), zeros=("final_logits_bias",), also=_bart_sides,
)
MARIAN = dataclasses.replace(
    BART, model_type="marian", architecture="MarianMTModel",
    rows=(row("model.shared.weight", "embedding_VD", "VD"),
          *_bart_side("encoder"), *_bart_side("decoder")),
    # The size is written as `vocab_size` by the fields of BART.
    fields=(*BART.fields, Field("scale_embedding", "scale_embeddings"),
            Field(None, "vocab_size", _one_vocabulary)),
    fixed=BART.fixed | {"positions": "sinusoidal", "embedding_norm": False},
    required={"tie_word_embeddings": True, "share_encoder_decoder_embeddings": True},
    repeated=(*BART.repeated, "model.encoder.embed_positions.weight",
              "model.decoder.embed_positions.weight"),
    also=lambda model: _bart_sides(model) | {"decoder_vocab_size": model.vocab_size},
)
ENCODER_DECODERS = (T5, BART, MARIAN)
