"""Published models as configs: the sizes of each, to train one like it, or to plan what it takes.

    batiste train --config=configs/families.py:smollm2_135m --workdir=runs/smollm2_135m
    batiste plan --config=configs/families.py:gemma2_9b --topology=v5p:4x4x4

Weights come with `batiste import`, which reads sizes from the files and needs none of these. Each
trains on the standard library for 1,000 steps until data and training are said: give your own. Their
parameter counts are held to the published ones (tests/test_configs.py). PaLM's sizes are those of
arXiv:2204.02311, table 1; the others' are in the config.json that was published with them.
"""

from typing import Any

from batiste.configs.experiment import Experiment
from batiste.data import DataConfig
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig


def _sizes(depth: int, width: int, heads: tuple[int, int, int], mlp_dim: int) -> dict[str, int]:
    """heads: of queries, of keys and values, and their dim."""
    num_heads, num_kv_heads, head_dim = heads
    return dict(num_layers=depth, model_dim=width, num_heads=num_heads, num_kv_heads=num_kv_heads,
                head_dim=head_dim, mlp_dim=mlp_dim)


def _gpt2(*sizes: Any) -> dict[str, Any]:
    return _sizes(*sizes) | dict(
        vocab_size=50_257, max_length=1024, activation="gelu", norm="layer", norm_epsilon=1e-5,
        bias="all", positions="learned")


def _llama2(*sizes: Any) -> dict[str, Any]:
    return _sizes(*sizes) | dict(
        vocab_size=32_000, max_length=4096, norm_epsilon=1e-5, tied_embeddings=False)


def _llama3(*sizes: Any, factor: float) -> dict[str, Any]:
    return _sizes(*sizes) | dict(
        vocab_size=128_256, max_length=131_072, norm_epsilon=1e-5, rope_base=500_000.0,
        rope_scaling="llama3", rope_factor=factor, rope_original_length=8192)


def _mistral(*sizes: Any) -> dict[str, Any]:
    return _sizes(*sizes) | dict(
        vocab_size=32_000, max_length=32_768, norm_epsilon=1e-5, tied_embeddings=False,
        layer_pattern=("local",), window=4096)


def _qwen2(*sizes: Any, vocab_size: int, tied: bool) -> dict[str, Any]:
    return _sizes(*sizes) | dict(
        vocab_size=vocab_size, max_length=32_768, rope_base=1_000_000.0, bias="qkv",
        tied_embeddings=tied)


def _qwen3(*sizes: Any, tied: bool = False) -> dict[str, Any]:
    return _sizes(*sizes) | dict(
        vocab_size=151_936, max_length=40_960, rope_base=1_000_000.0, qk_norm=True,
        tied_embeddings=tied)


def _gemma(*sizes: Any, scale: int, window: int) -> dict[str, Any]:
    return _sizes(*sizes) | dict(
        activation="geglu", norm="rms_plus_one", norm_placement="sandwich", scale_embeddings=True,
        attention_scale=scale**-0.5, window=window)


def _gemma2(*sizes: Any, scale: int = 256) -> dict[str, Any]:
    return _gemma(*sizes, scale=scale, window=4096) | dict(
        vocab_size=256_000, max_length=8192, layer_pattern=("local", "global"),
        attention_soft_cap=50.0, logit_soft_cap=30.0)


def _gemma3(*sizes: Any, window: int, length: int = 131_072) -> dict[str, Any]:
    return _gemma(*sizes, scale=256, window=window) | dict(
        vocab_size=262_144, max_length=length, qk_norm=True, rope_base=1_000_000.0,
        local_rope_base=10_000.0, layer_pattern=("local",) * 5 + ("global",))


def _smollm2(*sizes: Any, base: float = 100_000.0) -> dict[str, Any]:
    return _sizes(*sizes) | dict(
        vocab_size=49_152, max_length=8192, norm_epsilon=1e-5, rope_base=base)


def _bloom(depth: int, width: int, num_heads: int) -> dict[str, Any]:
    return _sizes(depth, width, (num_heads, num_heads, width // num_heads), 4 * width) | dict(
        vocab_size=250_880, max_length=2048, activation="gelu", norm="layer", norm_epsilon=1e-5,
        bias="all", positions="alibi", embedding_norm=True)


def _palm(depth: int, width: int, num_heads: int) -> dict[str, Any]:
    return _sizes(depth, width, (num_heads, 1, 256), 4 * width) | dict(
        vocab_size=256_000, max_length=2048, norm="layer", norm_placement="parallel")


def _latent(*sizes: Any, ranks: tuple[int | None, int], experts: tuple[int, int, int]) -> dict:
    """ranks: of queries and of latents. experts: all, of a token, shared."""
    num_experts, experts_per_token, shared_experts = experts
    return _sizes(*sizes) | dict(
        query_rank=ranks[0], latent_rank=ranks[1], rope_dim=64, value_dim=128,
        num_experts=num_experts, experts_per_token=experts_per_token,
        shared_experts=shared_experts, expert_scores="sigmoid", router_bias=True,
        tied_embeddings=False)


# DeepSeek-V3 without its head for the token after the next.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2_medium": _gpt2(24, 1024, (16, 16, 64), 4096),
    "gpt2_large": _gpt2(36, 1280, (20, 20, 64), 5120),
    "gpt2_xl": _gpt2(48, 1600, (25, 25, 64), 6400),
    "llama2_7b": _llama2(32, 4096, (32, 32, 128), 11_008),
    "llama2_70b": _llama2(80, 8192, (64, 8, 128), 28_672),
    "llama3_2_1b": _llama3(16, 2048, (32, 8, 64), 8192, factor=32.0),
    "llama3_2_3b": _llama3(28, 3072, (24, 8, 128), 8192, factor=32.0),
    "mistral_7b": _mistral(32, 4096, (32, 8, 128), 14_336),
    "qwen2_5_0_5b": _qwen2(24, 896, (14, 2, 64), 4864, vocab_size=151_936, tied=True),
    "qwen2_5_7b": _qwen2(28, 3584, (28, 4, 128), 18_944, vocab_size=152_064, tied=False),
    "qwen3_0_6b": _qwen3(28, 1024, (16, 8, 128), 3072, tied=True),
    "qwen3_8b": _qwen3(36, 4096, (32, 8, 128), 12_288),
    "qwen3_30b_a3b": _qwen3(48, 2048, (32, 4, 128), 768) | dict(
        num_experts=128, experts_per_token=8),
    "gemma2_2b": _gemma2(26, 2304, (8, 4, 256), 9216),
    "gemma2_9b": _gemma2(42, 3584, (16, 8, 256), 14_336),
    "gemma2_27b": _gemma2(46, 4608, (32, 16, 128), 36_864, scale=144),
    "gemma3_1b": _gemma3(26, 1152, (4, 1, 256), 6912, window=512, length=32_768),
    "gemma3_4b": _gemma3(34, 2560, (8, 4, 256), 10_240, window=1024) | dict(
        vocab_size=262_208, rope_scaling="linear", rope_factor=8.0),
    "smollm2_135m": _smollm2(30, 576, (9, 3, 64), 1536),
    "smollm2_360m": _smollm2(32, 960, (15, 5, 64), 2560),
    "smollm2_1_7b": _smollm2(24, 2048, (32, 32, 64), 8192, base=130_000.0),
    "bloom_560m": _bloom(24, 1024, 16),
    "bloom_7b1": _bloom(30, 4096, 32),
    "bloom_176b": _bloom(70, 14_336, 112),
    "deepseek_v3": _latent(
        61, 7168, (128, 128, 192), 2048, ranks=(1536, 512), experts=(256, 8, 1)) | dict(
        vocab_size=129_280, max_length=4096, routed_scale=2.5, dense_layers=3,
        dense_mlp_dim=18_432, expert_groups=8, groups_per_token=4),
    "palm_8b": _palm(32, 4096, 16),
    "palm_62b": _palm(64, 8192, 32),
    "palm_540b": _palm(118, 18_432, 48),
}


def get_config(arg: str | None = None) -> Experiment:
    """The model named by `arg`; ValueError names those that there are."""
    if arg not in MODELS:
        raise ValueError(f"configs/families.py:{arg}: expected one of {', '.join(MODELS)}")
    model = TransformerConfig(
        **MODELS[arg], init_stddev=0.02, dtype="bfloat16", attention="auto", remat="full")
    experiment = Experiment(
        model=model, data=DataConfig(sequence_length=1024), mesh=MeshConfig(zero=3))
    if model.dense_layers:
        experiment.train.health.every = None  # It does not know layers of two sizes.
    return experiment
