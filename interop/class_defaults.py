"""What a config.json says by leaving a key out: the defaults of the classes of `transformers` 5.24.

Files are written without what is a default, so each key that reaches the logits is here, also
where all known models have another value. A test compares the tables with the installed classes.
"""

from collections.abc import Mapping
from typing import Any

from batiste.data.json_files import check_json, shown

TOKENS = {"bos_token_id": int | None, "eos_token_id": int | list[int] | None,
          "pad_token_id": int | None, "decoder_start_token_id": int | None}
# Of every class: what no default shows the kind of.
GENERAL = TOKENS | {
    "model_type": str, "architectures": list[str] | None, "dtype": str | None,
    "torch_dtype": str | None, "rope_parameters": dict | None, "rope_scaling": dict | None,
    "rope_theta": float | None, "rope_local_base_freq": float | None,
    "partial_rotary_factor": float | None, "original_max_position_embeddings": int | None,
    "sliding_window_pattern": int | None, "seq_length": int | None, "head_dim": int | None,
    "position_embedding_type": str | None, "n_embed": int | None, "dense_act_fn": str | None,
    "is_gated_act": bool | None, "scale_decoder_outputs": bool | None,
}
# Of keys that are null by default.
KINDS = {
    "num_key_value_heads": int, "head_dim": int, "n_inner": int, "layer_types": list[str],
    "mlp_only_layers": list[int], "num_decoder_layers": int, "final_logit_softcapping": float,
    "attn_logit_softcapping": float, "sliding_window": int, "decoder_vocab_size": int,
    "use_bidirectional_attention": bool,
}
# Layers before which windows or experts do not begin, experts that need not be there.
MAY_BE_ZERO = ("first_k_dense_replace", "n_shared_experts", "max_window_layers")
MAX_SIZE = 2**31 - 1
DECODER = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}
MISTRAL = DECODER | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    "head_dim": None,
}
WINDOWS = {"use_sliding_window": False, "sliding_window": 4096}
QWEN2 = DECODER | WINDOWS | {
    "vocab_size": 151_936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32_768, "max_window_layers": 28, "layer_types": None,
}
GEMMA = DECODER | {
    "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": 256.0,
    "sliding_window": 4096, "layer_types": None, "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0, "use_bidirectional_attention": None,
}
del GEMMA["hidden_act"]
BERT = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "max_position_embeddings": 512,
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0, "is_decoder": False,
    "add_cross_attention": False, "tie_word_embeddings": True,
}
BART = {
    "vocab_size": 50265, "max_position_embeddings": 1024, "encoder_layers": 12,
    "encoder_ffn_dim": 4096, "encoder_attention_heads": 16, "decoder_layers": 12,
    "decoder_ffn_dim": 4096, "decoder_attention_heads": 16, "activation_function": "gelu",
    "d_model": 1024, "scale_embedding": False, "is_encoder_decoder": True,
    "tie_word_embeddings": True,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": DECODER | {"attention_bias": False, "mlp_bias": False, "head_dim": None},
    "mistral": MISTRAL | {"sliding_window": 4096},
    "qwen2": QWEN2,
    "qwen3": QWEN2 | {"head_dim": 128, "attention_bias": False},
    "qwen3_moe": DECODER | WINDOWS | {
        "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 24, "num_key_value_heads": 4, "max_position_embeddings": 32_768,
        "attention_bias": False, "decoder_sparse_step": 1, "moe_intermediate_size": 768,
        "num_experts_per_tok": 8, "num_experts": 128, "norm_topk_prob": False,
        "mlp_only_layers": None,
    },
    "mixtral": MISTRAL | {
        "rms_norm_eps": 1e-5, "sliding_window": None, "num_experts_per_tok": 2,
        "num_local_experts": 8, "rope_theta": 1_000_000.0,
    },
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {
        "vocab_size": 262_208, "max_position_embeddings": 131_072, "rope_theta": 1_000_000.0,
        "final_logit_softcapping": None, "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    "deepseek_v3": DECODER | {
        "vocab_size": 129_280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
        "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8,
        "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "norm_topk_prob": True, "max_position_embeddings": 4096, "rope_interleave": True,
        "attention_bias": False,
    },
    "cohere": {key: value for key, value in DECODER.items() if key != "rms_norm_eps"} | {
        "vocab_size": 256_000, "hidden_size": 8192, "intermediate_size": 22528,
        "logit_scale": 0.0625, "num_hidden_layers": 40, "num_attention_heads": 64,
        "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "tie_word_embeddings": True,
        "attention_bias": False, "use_qk_norm": False, "rope_theta": 500_000.0,
    },
    "gpt2": {
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
        "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False, "tie_word_embeddings": True,
    },
    "bloom": {
        "vocab_size": 250_880, "hidden_size": 64, "n_layer": 2, "n_head": 8,
        "layer_norm_epsilon": 1e-5, "apply_residual_connection_post_layernorm": False,
        "slow_but_exact": False, "tie_word_embeddings": True,
    },
    "bert": BERT,
    "roberta": BERT | {"vocab_size": 50265, "pad_token_id": 1},
    "distilbert": {
        "vocab_size": 30522, "max_position_embeddings": 512, "n_layers": 6, "n_heads": 12,
        "dim": 768, "hidden_dim": 3072, "activation": "gelu", "tie_word_embeddings": True,
    },
    "albert": {key: value for key, value in BERT.items()
               if key not in ("is_decoder", "add_cross_attention")} | {
        "vocab_size": 30000, "embedding_size": 128, "hidden_size": 4096, "num_hidden_groups": 1,
        "num_attention_heads": 64, "intermediate_size": 16384, "inner_group_num": 1,
        "hidden_act": "gelu_new",
    },
    "electra": BERT | {
        "embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
    "t5": {
        "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6,
        "num_decoder_layers": None, "num_heads": 8, "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu", "is_encoder_decoder": True, "is_decoder": False,
    },
    "bart": BART,
    "marian": BART | {
        "vocab_size": 58101, "decoder_vocab_size": None, "share_encoder_decoder_embeddings": True,
    },
}
# Other names of a key, as a class or its older files spell it.
GPT2_NAMES = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
BART_NAMES = {"num_attention_heads": "encoder_attention_heads", "hidden_size": "d_model",
              "num_hidden_layers": "encoder_layers"}
NAMES: Mapping[str, Mapping[str, str]] = {
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "mixtral": {"num_experts": "num_local_experts"},
    "deepseek_v3": {"num_local_experts": "n_routed_experts"},
    "gpt2": GPT2_NAMES | {"hidden_size": "n_embd", "max_position_embeddings": "n_positions"},
    "bloom": GPT2_NAMES | {"n_embed": "hidden_size"},
    "distilbert": {"hidden_size": "dim", "num_attention_heads": "n_heads",
                   "num_hidden_layers": "n_layers"},
    "t5": {"hidden_size": "d_model", "num_attention_heads": "num_heads",
           "num_hidden_layers": "num_layers", "head_dim": "d_kv"},
    "bart": BART_NAMES, "marian": BART_NAMES,
}


def completed(source_config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """A config with each key under its own name, and the class's default for those left out.

    Args:
        source_config: What a config.json says.
        model_type: Whose class reads it, a key of `DEFAULTS`.

    Raises:
        ValueError: For a key of another type, out of its range, or named twice in different ways.
    """
    defaults, named = DEFAULTS[model_type], dict(source_config)
    for other, name in NAMES.get(model_type, {}).items():
        value = named.pop(other, None)
        if value is None:
            continue
        if named.get(name, value) != value:
            raise ValueError(f"config.json: {other}={shown(value)} and {name}={shown(named[name])} "
                             "are two names of one size: leave one of them out")
        named[name] = value
    kinds = {key: (KINDS[key] if value is None else type(value)) | None
             for key, value in defaults.items()}
    check_json(named, GENERAL | kinds, "config.json")
    for key in (kinds | GENERAL).keys() - TOKENS.keys():
        value, lowest = named.get(key), 0 if key in MAY_BE_ZERO else 1
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if isinstance(value, int) and not lowest <= value <= MAX_SIZE:
            raise ValueError(f"config.json: {key}={value}: expected {lowest} to {MAX_SIZE:,}")
        if not value > 0 and key not in MAY_BE_ZERO:
            raise ValueError(f"config.json: {key}={value}: expected a number above 0")
    return {**defaults, **named}
