"""The families: tables, from which reading and writing both follow."""

from collections.abc import Mapping, Sequence
from typing import Any

from batiste.interop.encoder_decoders import ENCODER_DECODERS
from batiste.interop.encoders import ENCODERS
from batiste.interop.family import Family, Field, from_square, to_square
from batiste.interop.layout import Row, biased, row

LAYER = "layers/"


def _attention_rows(prefix: str, rotary: str | None = None) -> tuple[Row, ...]:
    """Queries, keys, values and output as four linear layers, with what may belong to them."""
    prefix, ours = prefix + "self_attn.", LAYER + "attention/"
    return (
        row(prefix + "q_proj.weight", ours + "query_DNH", "(NH)D", rotary=rotary),
        row(prefix + "k_proj.weight", ours + "key_DKH", "(KH)D", rotary=rotary),
        row(prefix + "v_proj.weight", ours + "value_DKH", "(KH)D"),
        row(prefix + "o_proj.weight", ours + "out_NHD", "D(NH)"),
        row(prefix + "q_proj.bias", ours + "query_bias_NH", "(NH)"),
        row(prefix + "k_proj.bias", ours + "key_bias_KH", "(KH)"),
        row(prefix + "v_proj.bias", ours + "value_bias_KH", "(KH)"),
        row(prefix + "o_proj.bias", ours + "out_bias_D", "D"),
        row(prefix + "q_norm.weight", ours + "query_norm/scale_H", "H"),
        row(prefix + "k_norm.weight", ours + "key_norm/scale_H", "H"),
    )


def _gated_rows(prefix: str, ours: str, names: Sequence[str], experts: str = "") -> tuple[Row, ...]:
    gate, up, down = names
    E = "E" if experts else ""
    return (
        row(f"{prefix}{experts}{gate}.weight", f"{ours}gate_{E}DF", "FD"),
        row(f"{prefix}{experts}{up}.weight", f"{ours}up_{E}DF", "FD"),
        row(f"{prefix}{experts}{down}.weight", f"{ours}down_{E}FD", "DF"),
    )


MODEL_LAYER = "model.layers.{layer}."
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ENDS = (
    row("model.embed_tokens.weight", "embedding_VD", "VD"),
    row("model.norm.weight", "norm/scale_D", "D"),
    row("lm_head.weight", "head_DV", "VD"),
)
PRE_NORMS = (
    row(MODEL_LAYER + "input_layernorm.weight", LAYER + "attention_norm/scale_D", "D"),
    row(MODEL_LAYER + "post_attention_layernorm.weight", LAYER + "feed_forward_norm/scale_D", "D"),
)
DENSE = _gated_rows(MODEL_LAYER + "mlp.", LAYER + "feed_forward/", PROJECTIONS)
LLAMA_ROWS = (*ENDS, *PRE_NORMS, *_attention_rows(MODEL_LAYER), *DENSE)
MIXTRAL_ROWS = (
    *ENDS, *PRE_NORMS, *_attention_rows(MODEL_LAYER),
    row(MODEL_LAYER + "block_sparse_moe.gate.weight", LAYER + "mixture/router_DE", "ED"),
    *_gated_rows(MODEL_LAYER + "block_sparse_moe.", LAYER + "mixture/", ("w1", "w3", "w2"),
                 "experts.{expert}."),
)
EXPERT_ROWS = (
    row(MODEL_LAYER + "mlp.gate.weight", LAYER + "mixture/router_DE", "ED"),
    *_gated_rows(MODEL_LAYER + "mlp.", LAYER + "mixture/", PROJECTIONS, "experts.{expert}."),
)
QWEN3_MOE_ROWS = (*ENDS, *PRE_NORMS, *_attention_rows(MODEL_LAYER), *EXPERT_ROWS)
SANDWICH = tuple(
    row(f"{MODEL_LAYER}{theirs}_layernorm.weight", f"{LAYER}{ours}_norm/scale_D", "D")
    for theirs, ours in (
        ("input", "attention"), ("post_attention", "attention_post"),
        ("pre_feedforward", "feed_forward"), ("post_feedforward", "feed_forward_post"),
    )
)
GEMMA_ROWS = (*ENDS, *SANDWICH, *_attention_rows(MODEL_LAYER), *DENSE)
LATENT, LATENT_LAYER = LAYER + "attention/", MODEL_LAYER + "self_attn."
LATENT_ROWS = (
    *PRE_NORMS,
    row(LATENT_LAYER + "q_proj.weight", LATENT + "query_DNH", "(NH)D", rotary="H"),
    row(LATENT_LAYER + "q_a_proj.weight", LATENT + "query_down_DR", "RD"),
    row(LATENT_LAYER + "q_a_layernorm.weight", LATENT + "query_norm/scale_R", "R"),
    row(LATENT_LAYER + "q_b_proj.weight", LATENT + "query_up_RNH", "(NH)R", rotary="H"),
    row(LATENT_LAYER + "kv_a_proj_with_mqa.weight", LATENT + "down_DR", "RD", rotary="R"),
    row(LATENT_LAYER + "kv_a_layernorm.weight", LATENT + "latent_norm/scale_R", "R"),
    row(LATENT_LAYER + "kv_b_proj.weight", LATENT + "up_RNH", "(NH)R"),
    row(LATENT_LAYER + "o_proj.weight", LATENT + "out_NHD", "D(NH)"),
)
DEEPSEEK_ROWS = (
    *ENDS, *LATENT_ROWS, *EXPERT_ROWS,
    *(row._replace(ours=("dense_" + row.ours[0],)) for row in (*LATENT_ROWS, *DENSE)),
    row(MODEL_LAYER + "mlp.gate.e_score_correction_bias", LAYER + "mixture/router_bias_E", "E",
         always_float32=True),
    *_gated_rows(MODEL_LAYER + "mlp.shared_experts.", LAYER + "feed_forward/", PROJECTIONS),
)
# Cohere multiplies its logits; a power of two may as well be in the norm before the head.
COHERE_ROWS = (
    row("model.embed_tokens.weight", "embedding_VD", "VD"),
    row("model.norm.weight", "norm/scale_D", "D", scaled_by="logit_scale"),
    row(MODEL_LAYER + "input_layernorm.weight", LAYER + "attention_norm/scale_D", "D"),
    *_attention_rows(MODEL_LAYER, rotary="H"), *DENSE,
)
GPT2_LAYER, HEADS = "transformer.h.{layer}.", LAYER + "attention/"
QKV = tuple(HEADS + name for name in ("query_DNH", "key_DKH", "value_DKH"))
QKV_BIAS = tuple(HEADS + name for name in ("query_bias_NH", "key_bias_KH", "value_bias_KH"))
# GPT-2 keeps its matrices inputs first.
GPT2_ROWS = (
    row("transformer.wte.weight", "embedding_VD", "VD"),
    row("transformer.wpe.weight", "position_TD", "TD"),
    *biased("transformer.ln_f", "norm/scale_D", "D"),
    row("lm_head.weight", "head_DV", "VD"),
    *biased(GPT2_LAYER + "ln_1", LAYER + "attention_norm/scale_D", "D"),
    *biased(GPT2_LAYER + "ln_2", LAYER + "feed_forward_norm/scale_D", "D"),
    Row(GPT2_LAYER + "attn.c_attn.weight", QKV, "D(3NH)"),
    Row(GPT2_LAYER + "attn.c_attn.bias", QKV_BIAS, "(3NH)"),
    *biased(GPT2_LAYER + "attn.c_proj", HEADS + "out_NHD", "(NH)D"),
    *biased(GPT2_LAYER + "mlp.c_fc", LAYER + "feed_forward/up_DF", "DF"),
    *biased(GPT2_LAYER + "mlp.c_proj", LAYER + "feed_forward/down_FD", "FD"),
)
BLOOM_ROWS = (
    row("transformer.word_embeddings.weight", "embedding_VD", "VD"),
    *biased("transformer.word_embeddings_layernorm", "embedding_norm/scale_D", "D"),
    *biased("transformer.ln_f", "norm/scale_D", "D"),
    row("lm_head.weight", "head_DV", "VD"),
    *biased(GPT2_LAYER + "input_layernorm", LAYER + "attention_norm/scale_D", "D"),
    *biased(GPT2_LAYER + "post_attention_layernorm", LAYER + "feed_forward_norm/scale_D", "D"),
    Row(GPT2_LAYER + "self_attention.query_key_value.weight", QKV, "(N3H)D"),
    Row(GPT2_LAYER + "self_attention.query_key_value.bias", QKV_BIAS, "(N3H)"),
    *biased(GPT2_LAYER + "self_attention.dense", HEADS + "out_NHD", "D(NH)"),
    *biased(GPT2_LAYER + "mlp.dense_h_to_4h", LAYER + "feed_forward/up_DF", "FD"),
    *biased(GPT2_LAYER + "mlp.dense_4h_to_h", LAYER + "feed_forward/down_FD", "DF"),
)


def _value(theirs: Mapping, name: str) -> Any:
    if theirs[name] is None:
        raise ValueError(f"config.json: {name} is null; a {theirs.get('model_type')} has one")
    return theirs[name]


def _several(count: int) -> int:
    """Experts of a token, whose scores are made to add up to 1: of one alone ours stays as it is."""
    if count < 2:
        raise ValueError(f"config.json: num_experts_per_tok={count}: expected at least 2, among "
                         "which scores are normalized")
    return count


def _latent_head_dim(theirs: Mapping) -> int:
    if (given := theirs.get("head_dim")) not in (None, theirs["qk_rope_head_dim"]):
        raise ValueError(f"config.json: head_dim={given}: expected qk_rope_head_dim="
                         f"{theirs['qk_rope_head_dim']}, or none")
    return _value(theirs, "qk_nope_head_dim") + theirs["qk_rope_head_dim"]


def _dense_size(theirs: Mapping) -> int | None:
    """Of the layers before those with experts; their config has it without them too."""
    return _value(theirs, "intermediate_size") if theirs["first_k_dense_replace"] else None


def _head_dim(theirs: Mapping) -> int:
    return theirs["hidden_size"] // theirs["num_attention_heads"]


# Keys that nearly all families share.
BASE = (
    Field("vocab_size", "vocab_size"), Field("num_hidden_layers", "num_layers"),
    Field("hidden_size", "model_dim"), Field("num_attention_heads", "num_heads"),
    Field("num_key_value_heads", "num_kv_heads", lambda theirs: theirs["num_attention_heads"]),
    Field("max_position_embeddings", "max_length"),
    Field("tie_word_embeddings", "tied_embeddings"),
)
RMS = Field("rms_norm_eps", "norm_epsilon")
# With a head dim that may be null, or is a size of its own.
SHARED = (*BASE, RMS, Field("head_dim", "head_dim", _head_dim))
SIZED = (*BASE, RMS, Field("head_dim", "head_dim"))
DENSE_SIZE = Field("intermediate_size", "mlp_dim")


def _all(kind: str, theirs: Mapping) -> list[str]:
    return [kind] * theirs["num_hidden_layers"]


def _mistral_kinds(theirs: Mapping) -> list[str]:
    return _all("global" if theirs["sliding_window"] is None else "local", theirs)


def _qwen_kinds(theirs: Mapping) -> list[str]:
    """Windows, where they are used, from layer `max_window_layers` on."""
    if not theirs["use_sliding_window"] or theirs["sliding_window"] is None:
        return _all("global", theirs)
    first = _value(theirs, "max_window_layers")
    return ["local" if layer >= first else "global" for layer in range(theirs["num_hidden_layers"])]


def _every(period: int, theirs: Mapping) -> list[str]:
    """A global layer after every period - 1 local ones."""
    return ["local" if (layer + 1) % period else "global"
            for layer in range(theirs["num_hidden_layers"])]


def _gemma3_kinds(theirs: Mapping) -> list[str]:
    return _every(theirs.get("sliding_window_pattern") or 6, theirs)


def _null(theirs: Mapping) -> None:
    """Of a key that may be null."""


SILU = {"hidden_act": "silu"}
LLAMA = Family(
    "llama", "LlamaForCausalLM", LLAMA_ROWS, (*SHARED, DENSE_SIZE),
    required=SILU | {"attention_bias": False, "mlp_bias": False}, rotates=True,
)
MISTRAL = Family(
    "mistral", "MistralForCausalLM", LLAMA_ROWS,
    (*SHARED, DENSE_SIZE), required=SILU, kinds=_mistral_kinds, rotates=True,
)
QWEN2 = Family(
    "qwen2", "Qwen2ForCausalLM", LLAMA_ROWS,
    (*SHARED, DENSE_SIZE), fixed={"bias": "qkv"},
    required=SILU, kinds=_qwen_kinds, has_layer_types=True, switch="use_sliding_window",
    rotates=True,
)
QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM", LLAMA_ROWS,
    (*SIZED, DENSE_SIZE), fixed={"qk_norm": True},
    required=SILU | {"attention_bias": False}, kinds=_qwen_kinds, has_layer_types=True,
    switch="use_sliding_window", rotates=True,
)
QWEN3_MOE = Family(
    "qwen3_moe", "Qwen3MoeForCausalLM", QWEN3_MOE_ROWS,
    (*SHARED, Field("moe_intermediate_size", "mlp_dim"),
     Field("num_experts_per_tok", "experts_per_token", read=_several),
     Field("num_experts", "num_experts")),
    fixed={"qk_norm": True},
    required=SILU | {"attention_bias": False, "norm_topk_prob": True, "decoder_sparse_step": 1,
                     "mlp_only_layers": [], "use_sliding_window": False},
    rotates=True,
)
MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM", MIXTRAL_ROWS,
    (*SHARED, DENSE_SIZE,
     Field("num_local_experts", "num_experts"),
     Field("num_experts_per_tok", "experts_per_token", read=_several)),
    required=SILU, kinds=_mistral_kinds, rotates=True,
)
GEMMA = dict(activation="geglu", norm="rms_plus_one", norm_placement="sandwich",
             scale_embeddings=True)
GEMMA_FIELDS = (
    Field("query_pre_attn_scalar", "attention_scale", read=from_square, write=to_square),
    Field("final_logit_softcapping", "logit_soft_cap", _null),
)
GEMMA_REQUIRED = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
                  "use_bidirectional_attention": False}
GEMMA2 = Family(
    "gemma2", "Gemma2ForCausalLM", GEMMA_ROWS,
    (*SIZED, DENSE_SIZE, *GEMMA_FIELDS,
     Field("attn_logit_softcapping", "attention_soft_cap", _null)),
    fixed=GEMMA, required=GEMMA_REQUIRED, kinds=lambda theirs: _every(2, theirs),
    has_layer_types=True, rotates=True,
)
GEMMA3 = Family(
    "gemma3_text", "Gemma3ForCausalLM", GEMMA_ROWS,
    (*SIZED, DENSE_SIZE, *GEMMA_FIELDS),
    fixed=GEMMA | {"qk_norm": True}, kinds=_gemma3_kinds,
    required=GEMMA_REQUIRED | {"attn_logit_softcapping": None},
    has_layer_types=True, rotates=True, local_rope_base=10_000.0,
)
DEEPSEEK = Family(
    "deepseek_v3", "DeepseekV3ForCausalLM", DEEPSEEK_ROWS,
    (*BASE, RMS, Field("qk_rope_head_dim", "rope_dim"), Field(None, "head_dim", _latent_head_dim),
     Field("v_head_dim", "value_dim"),
     Field("kv_lora_rank", "latent_rank"), Field("q_lora_rank", "query_rank", _null),
     Field("first_k_dense_replace", "dense_layers"), Field(None, "dense_mlp_dim", _dense_size),
     Field("moe_intermediate_size", "mlp_dim"), Field("n_routed_experts", "num_experts"),
     Field("num_experts_per_tok", "experts_per_token", read=_several), Field("n_shared_experts", "shared_experts"),
     Field("n_group", "expert_groups"), Field("topk_group", "groups_per_token"),
     Field("routed_scaling_factor", "routed_scale")),
    fixed={"expert_scores": "sigmoid", "router_bias": True},
    required=SILU | {"attention_bias": False, "norm_topk_prob": True, "rope_interleave": True},
    rotates=True,
    also=lambda model: {"qk_nope_head_dim": model.head_dim - (model.rope_dim or 0),
                        "qk_head_dim": model.head_dim, "head_dim": model.rope_dim,
                        "intermediate_size": model.dense_mlp_dim or model.mlp_dim},
)
COHERE = Family(
    "cohere", "CohereForCausalLM", COHERE_ROWS,
    (*BASE, Field("layer_norm_eps", "norm_epsilon"), Field("head_dim", "head_dim", _head_dim),
     DENSE_SIZE),
    fixed={"norm": "layer", "norm_placement": "parallel"},
    required=SILU | {"attention_bias": False, "use_qk_norm": False}, rotates=True,
    extra={"logit_scale": 1.0},
)
GPT2 = Family(
    "gpt2", "GPT2LMHeadModel", GPT2_ROWS,
    (Field("vocab_size", "vocab_size"), Field("n_layer", "num_layers"),
     Field("n_embd", "model_dim"), Field("n_head", "num_heads"),
     Field(None, "num_kv_heads", lambda theirs: theirs["n_head"]),
     Field(None, "head_dim", lambda theirs: theirs["n_embd"] // theirs["n_head"]),
     Field("n_inner", "mlp_dim", lambda theirs: 4 * theirs["n_embd"]),
     Field("n_positions", "max_length"), Field("layer_norm_epsilon", "norm_epsilon"),
     Field("tie_word_embeddings", "tied_embeddings")),
    fixed={"activation": "gelu", "norm": "layer", "bias": "all", "positions": "learned"},
    required={"activation_function": "gelu_new", "scale_attn_weights": True,
              "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
)
BLOOM = Family(
    "bloom", "BloomForCausalLM", BLOOM_ROWS,
    (Field("vocab_size", "vocab_size"), Field("n_layer", "num_layers"),
     Field("hidden_size", "model_dim"), Field("n_head", "num_heads"),
     Field(None, "num_kv_heads", lambda theirs: theirs["n_head"]),
     Field(None, "head_dim", lambda theirs: theirs["hidden_size"] // theirs["n_head"]),
     Field(None, "mlp_dim", lambda theirs: 4 * theirs["hidden_size"]),
     # Its class has no length, as its positions have none; older files say how far it was trained.
     Field("seq_length", "max_length", 2048), Field("layer_norm_epsilon", "norm_epsilon"),
     Field("tie_word_embeddings", "tied_embeddings")),
    fixed={"activation": "gelu", "norm": "layer", "bias": "all", "positions": "alibi",
           "embedding_norm": True},
    required={"apply_residual_connection_post_layernorm": False, "slow_but_exact": False},
)
# Of two that have the same model, the first is written: a Llama before its imitations.
FAMILIES = (
    LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, MIXTRAL, GEMMA2, GEMMA3, DEEPSEEK, COHERE, GPT2, BLOOM,
    *ENCODERS, *ENCODER_DECODERS,
)
