"""Published encoders and encoder-decoders as configs, each with the objective it was trained by.

    batiste train --config=configs/encoder_families.py:bert_base --workdir=runs/bert_base
    batiste plan --config=configs/encoder_families.py:t5_v1_1_xl --topology=v5p:4x4x4

As in configs/families.py, which has the decoders. Sizes are those of the config.json that was
published with each; those of the 2017 Transformer of arXiv:1706.03762, table 3, and of ELECTRA's
generators of arXiv:2003.10555, table 6.
"""

from typing import Any

from batiste.configs.experiment import Experiment
from batiste.data import DataConfig, RecordObjective
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig

MASKED = (RecordObjective("masked"),)
SENTENCES = (RecordObjective("order"),)
REPLACED = (RecordObjective("replaced"),)
SPANS = (RecordObjective("spans"),)
DENOISED = (RecordObjective("denoise", rate=0.3, shuffled=True),)


def _sizes(num_layers: int, model_dim: int, num_heads: int, mlp_dim: int) -> dict[str, Any]:
    return dict(num_layers=num_layers, model_dim=model_dim, num_heads=num_heads,
                num_kv_heads=num_heads, head_dim=model_dim // num_heads, mlp_dim=mlp_dim)


def _encoder(*sizes: int, vocab_size: int = 30_522, types: int | None = 2) -> dict[str, Any]:
    return _sizes(*sizes) | dict(
        form="encoder", vocab_size=vocab_size, max_length=512, activation="gelu_exact",
        norm="layer", norm_placement="post", norm_epsilon=1e-12, bias="all", positions="learned",
        embedding_norm=True, token_types=types, head_transform=True)


def _roberta(*sizes: int) -> dict[str, Any]:
    return _encoder(*sizes, vocab_size=50_265, types=1) | dict(norm_epsilon=1e-5)


def _albert(*sizes: int) -> dict[str, Any]:
    return _encoder(*sizes, vocab_size=30_000) | dict(
        embedding_dim=128, shared_layers=True, activation="gelu")


def _electra(*sizes: int, generator_heads: int, embedding_dim: int | None = None) -> dict[str, Any]:
    return _encoder(*sizes) | dict(
        head_transform=False, discriminator=True, generator_heads=generator_heads,
        embedding_dim=embedding_dim)


def _t5(num_layers: int, model_dim: int, num_heads: int, mlp_dim: int) -> dict[str, Any]:
    return dict(
        form="encoder_decoder", vocab_size=32_128, num_layers=num_layers,
        encoder_layers=num_layers, model_dim=model_dim, num_heads=num_heads,
        num_kv_heads=num_heads, head_dim=64, mlp_dim=mlp_dim, max_length=512, activation="geglu",
        norm_epsilon=1e-6, positions="relative", attention_scale=1.0, tied_embeddings=False)


def _post_norm(*sizes: int) -> dict[str, Any]:
    return _sizes(*sizes) | dict(
        form="encoder_decoder", encoder_layers=sizes[0], max_length=1024, norm="layer",
        norm_placement="post", norm_epsilon=1e-5, bias="all")


def _bart(*sizes: int) -> dict[str, Any]:
    return _post_norm(*sizes) | dict(
        vocab_size=50_265, activation="gelu_exact", positions="learned", embedding_norm=True)


def _transformer(*sizes: int, dropout: float) -> dict[str, Any]:
    return _post_norm(*sizes) | dict(
        vocab_size=37_000, activation="relu", positions="sinusoidal", scale_embeddings=True,
        dropout=dropout)


MODELS: dict[str, tuple[dict[str, Any], tuple[RecordObjective, ...]]] = {
    "bert_base": (_encoder(12, 768, 12, 3072), MASKED),
    "bert_large": (_encoder(24, 1024, 16, 4096), MASKED),
    "roberta_base": (_roberta(12, 768, 12, 3072), MASKED),
    "roberta_large": (_roberta(24, 1024, 16, 4096), MASKED),
    "distilbert_base": (_encoder(6, 768, 12, 3072, types=None), MASKED),
    "albert_base": (_albert(12, 768, 12, 3072), SENTENCES),
    "albert_xxlarge": (_albert(12, 4096, 64, 16_384), SENTENCES),
    "electra_small": (
        _electra(12, 256, 4, 1024, generator_heads=1, embedding_dim=128), REPLACED),
    "electra_base": (_electra(12, 768, 12, 3072, generator_heads=4), REPLACED),
    "electra_large": (_electra(24, 1024, 16, 4096, generator_heads=4), REPLACED),
    "t5_v1_1_base": (_t5(12, 768, 12, 2048), SPANS),
    "t5_v1_1_large": (_t5(24, 1024, 16, 2816), SPANS),
    "t5_v1_1_xl": (_t5(24, 2048, 32, 5120), SPANS),
    "t5_v1_1_xxl": (_t5(24, 4096, 64, 10_240), SPANS),
    "bart_base": (_bart(6, 768, 12, 3072), DENOISED),
    "bart_large": (_bart(12, 1024, 16, 4096), DENOISED),
    "transformer_base": (_transformer(6, 512, 8, 2048, dropout=0.1), DENOISED),
    "transformer_big": (_transformer(6, 1024, 16, 4096, dropout=0.3), DENOISED),
}


def get_config(arg: str | None = None) -> Experiment:
    """The model named by `arg`; ValueError names those that there are."""
    if arg not in MODELS:
        raise ValueError(
            f"configs/encoder_families.py:{arg}: expected one of {', '.join(MODELS)}")
    fields, objectives = MODELS[arg]
    model = TransformerConfig(
        **fields, init_stddev=0.02, dtype="bfloat16", attention="auto", remat="full")
    return Experiment(
        model=model, data=DataConfig(sequence_length=512, objectives=objectives),
        mesh=MeshConfig(zero=3))
