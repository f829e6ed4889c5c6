"""Encoders that predict hidden tokens, or find replaced ones: BERT and what followed it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from batiste.data.json_files import shown
from batiste.interop.family import Family, Field
from batiste.interop.layout import Row, biased, row

ACTIVATIONS = {
    "gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu",
    "silu": "silu", "swish": "silu",
}
NAMES = {"gelu_exact": "gelu", "gelu": "gelu_new"}
LAYER = "layers/"
FIXED = {
    "form": "encoder", "norm": "layer", "norm_placement": "post", "bias": "all",
    "positions": "learned", "embedding_norm": True, "tied_embeddings": True,
}
REQUIRED = {"tie_word_embeddings": True}
STACKED = REQUIRED | {"position_embedding_type": "absolute"}


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(
            f"config.json: the activation (hidden_act, activation or activation_function) is "
            f"{shown(name)}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activation_field(theirs: str) -> Field:
    """The key that names the activation of all layers."""
    return Field(theirs, "activation", read=_activation, write=lambda name: NAMES.get(name, name))


def _one_of(architectures: list[str], known: Sequence[str]) -> str:
    if not architectures or architectures[0] not in known:
        first = shown(architectures[0]) if architectures else ""
        raise ValueError(f"config.json: architectures=[{first}]: expected one of {', '.join(known)}")
    return architectures[0]


def _has_head(stem: str, *others: str) -> Field:
    """Whether the files have what leads to logits; a bare model of the family has hidden states."""
    masked, bare = f"{stem}ForMaskedLM", f"{stem}Model"

    def read(names: list[str]) -> bool:
        return _one_of(names, (masked, bare, *others)) != bare

    return Field("architectures", "head_transform", True, read,
                 lambda has: [masked if has else bare])


def _fields(length: Field, **names: str) -> tuple[Field, ...]:
    """Keys that all of them share, under the names of BERT but for those given."""
    def named(key: str) -> str:
        return names.get(key, key)

    heads, width = named("num_attention_heads"), named("hidden_size")
    return (
        Field("vocab_size", "vocab_size"), Field(named("num_hidden_layers"), "num_layers"),
        Field(width, "model_dim"), Field(heads, "num_heads"), length,
        Field(None, "num_kv_heads", lambda theirs: theirs[heads]),
        Field(None, "head_dim", lambda theirs: theirs[width] // theirs[heads]),
        Field(named("intermediate_size"), "mlp_dim"),
        activation_field(named("hidden_act")),
    )


LENGTH = Field("max_position_embeddings", "max_length")
TYPES = Field("type_vocab_size", "token_types")
EPSILON = Field("layer_norm_eps", "norm_epsilon")


def _embeddings(prefix: str, width: str) -> tuple[Row, ...]:
    return (
        row(prefix + "word_embeddings.weight", f"embedding_V{width}", f"V{width}"),
        row(prefix + "position_embeddings.weight", f"position_T{width}", f"T{width}"),
        row(prefix + "token_type_embeddings.weight", f"type_P{width}", f"P{width}"),
        *biased(prefix + "LayerNorm", f"embedding_norm/scale_{width}", width),
    )


def _layers(prefix: str, names: Mapping[str, str]) -> tuple[Row, ...]:
    """One layer's rows, under the family's names of its eight parts."""
    attention, feed = LAYER + "attention/", LAYER + "feed_forward/"
    return (
        *biased(prefix + names["query"], attention + "query_DNH", "(NH)D"),
        *biased(prefix + names["key"], attention + "key_DKH", "(KH)D"),
        *biased(prefix + names["value"], attention + "value_DKH", "(KH)D"),
        *biased(prefix + names["out"], attention + "out_NHD", "D(NH)"),
        *biased(prefix + names["norm"], LAYER + "attention_post_norm/scale_D", "D"),
        *biased(prefix + names["up"], feed + "up_DF", "FD"),
        *biased(prefix + names["down"], feed + "down_FD", "DF"),
        *biased(prefix + names["last_norm"], LAYER + "feed_forward_post_norm/scale_D", "D"),
    )


def _head(dense: str, norm: str, bias: str) -> tuple[Row, ...]:
    return (
        row(dense + ".weight", "head_transform/weight_DR", "RD"),
        row(dense + ".bias", "head_transform/bias_R", "R"),
        *biased(norm, "head_transform/norm/scale_R", "R"),
        row(bias, "head_transform/bias_V", "V"),
    )


BERT_LAYER = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "out": "attention.output.dense", "norm": "attention.output.LayerNorm",
    "up": "intermediate.dense", "down": "output.dense", "last_norm": "output.LayerNorm",
}
DISTIL_LAYER = {
    "query": "attention.q_lin", "key": "attention.k_lin", "value": "attention.v_lin",
    "out": "attention.out_lin", "norm": "sa_layer_norm", "up": "ffn.lin1", "down": "ffn.lin2",
    "last_norm": "output_layer_norm",
}
ALBERT_LAYER = {
    "query": "attention.query", "key": "attention.key", "value": "attention.value",
    "out": "attention.dense", "norm": "attention.LayerNorm", "up": "ffn", "down": "ffn_output",
    "last_norm": "full_layer_layer_norm",
}
BERT = Family(
    "bert", "BertForMaskedLM",
    (*_embeddings("bert.embeddings.", "D"), *_layers("bert.encoder.layer.{layer}.", BERT_LAYER),
     *_head("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
            "cls.predictions.bias")),
    (*_fields(LENGTH), TYPES, EPSILON, _has_head("Bert", "BertForPreTraining")), fixed=FIXED,
    required=STACKED | {"is_decoder": False, "add_cross_attention": False},
    repeated=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
    aside=("bert.pooler.", "pooler.", "cls.seq_relationship."),
)
# Places of RoBERTa begin behind its padding's: two rows of its table are never a token's.
PADDING_ROWS = 2
ROBERTA = dataclasses.replace(
    BERT, model_type="roberta", architecture="RobertaForMaskedLM",
    rows=(
        *(each._replace(skipped=PADDING_ROWS) if each.ours[0] == "position_TD" else each
          for each in _embeddings("roberta.embeddings.", "D")),
        *_layers("roberta.encoder.layer.{layer}.", BERT_LAYER),
        *_head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    ),
    fields=(
        *_fields(LENGTH._replace(read=lambda size: size - PADDING_ROWS,
                                 write=lambda size: size + PADDING_ROWS)),
        TYPES, EPSILON, _has_head("Roberta")),
    # Its head's activation is this one whatever the layers' is.
    required=BERT.required | {"pad_token_id": PADDING_ROWS - 1, "hidden_act": "gelu"},
    repeated=("lm_head.decoder.weight", "lm_head.decoder.bias"),
    aside=("roberta.pooler.", "pooler."),
)
DISTILBERT = Family(
    "distilbert", "DistilBertForMaskedLM",
    (*_embeddings("distilbert.embeddings.", "D"),
     *_layers("distilbert.transformer.layer.{layer}.", DISTIL_LAYER),
     *_head("vocab_transform", "vocab_layer_norm", "vocab_projector.bias")),
    (*_fields(LENGTH, num_attention_heads="n_heads", num_hidden_layers="n_layers",
              hidden_size="dim", intermediate_size="hidden_dim", hidden_act="activation"),
     _has_head("DistilBert")),
    # The table of sinusoids is a start that is then learned like any other.
    fixed=FIXED | {"norm_epsilon": 1e-12}, required=REQUIRED,
    repeated=("vocab_projector.weight",),
)


def _narrow(theirs: Mapping) -> int | None:
    """The size of what is embedded, where a product leads from it to the layers'."""
    if theirs["embedding_size"] is None:
        raise ValueError("config.json: embedding_size is null; an electra has one")
    return None if theirs["embedding_size"] == theirs["hidden_size"] else theirs["embedding_size"]


def _embedding_size(model) -> dict[str, int]:
    return {"embedding_size": model.embedding_dim or model.model_dim}


# What of ours each of ELECTRA's classes has.
ELECTRAS = {"ElectraForMaskedLM": "head_transform", "ElectraForPreTraining": "discriminator",
            "ElectraModel": None}


def _electra_has(head: str) -> Field:
    def read(theirs: Mapping) -> bool:
        given = theirs.get("architectures")
        return ELECTRAS[_one_of(["ElectraForMaskedLM"] if given is None else given,
                                tuple(ELECTRAS))] == head

    return Field(None, head, read)


def _electra_keys(model) -> dict[str, Any]:
    names = {head: name for name, head in ELECTRAS.items()}
    has = next((head for head in names if head is not None and getattr(model, head)), None)
    return _embedding_size(model) | {"architectures": [names[has]]}


ALBERT = Family(
    "albert", "AlbertForMaskedLM",
    (*_embeddings("albert.embeddings.", "R"),
     row("albert.encoder.embedding_hidden_mapping_in.weight", "widening_RD", "DR"),
     row("albert.encoder.embedding_hidden_mapping_in.bias", "widening_bias_D", "D"),
     *_layers("albert.encoder.albert_layer_groups.{layer}.albert_layers.0.", ALBERT_LAYER),
     *_head("predictions.dense", "predictions.LayerNorm", "predictions.bias")),
    # Its product is there even if both sizes are one.
    (*_fields(LENGTH), TYPES, EPSILON, Field("embedding_size", "embedding_dim"),
     _has_head("Albert", "AlbertForPreTraining")),
    fixed=FIXED | {"shared_layers": True},
    required=STACKED | {"num_hidden_groups": 1, "inner_group_num": 1},
    repeated=("predictions.decoder.weight", "predictions.decoder.bias"),
    aside=("albert.pooler.", "pooler.", "sop_classifier."),
)
ELECTRA = Family(
    "electra", "ElectraForMaskedLM",
    (*_embeddings("electra.embeddings.", "D"), *_embeddings("electra.embeddings.", "R"),
     row("electra.embeddings_project.weight", "widening_RD", "DR"),
     row("electra.embeddings_project.bias", "widening_bias_D", "D"),
     *_layers("electra.encoder.layer.{layer}.", BERT_LAYER),
     *_head("generator_predictions.dense", "generator_predictions.LayerNorm",
            "generator_lm_head.bias"),
     row("discriminator_predictions.dense.weight", "replaced_head/weight_DR", "RD"),
     row("discriminator_predictions.dense.bias", "replaced_head/bias_R", "R"),
     *biased("discriminator_predictions.dense_prediction", "replaced_head/out_RP", "PR")),
    (*_fields(LENGTH), TYPES, EPSILON, Field(None, "embedding_dim", _narrow),
     _electra_has("head_transform"), _electra_has("discriminator")),
    # Its head's activation is this one whatever the layers' is.
    fixed=FIXED, required=BERT.required | {"hidden_act": "gelu"},
    repeated=("generator_lm_head.weight",), also=_electra_keys,
)
ENCODERS = (BERT, ROBERTA, DISTILBERT, ALBERT, ELECTRA)
