"""What a model's fields may be, alone and together."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

from batiste.models.parts import ACTIVATIONS, LAYER_KINDS, MIXERS, NORMS, TURNS
from batiste.pallas_kernels import certified

FORMS = ("decoder", "encoder", "encoder_decoder")
NORM_PLACEMENTS = ("pre", "post", "sandwich", "parallel")
BIASES = ("none", "qkv", "all")
POSITIONS = ("rope", "learned", "sinusoidal", "alibi", "relative", "none")
ROPE_SCALINGS = ("linear", "llama3", "yarn")
REMAT_POLICIES = ("none", "dots", "full", "names")
# What a layer names while it runs, for `saved` and `offloaded`.
TENSOR_NAMES = ("query", "key", "value", "attended", "attention", "up", "gate", "feed_forward")
EXPERT_SCORES = ("softmax", "sigmoid")
DTYPES = ("float32", "bfloat16", "float16")
OWN = ("mixer", "activation", "norm", "positions", "layer_pattern")
ATTENTIONS = ("auto", "reference", *certified.CHIPS)


def check(config: Any) -> None:
    """Raises ValueError, naming the field and a fix, for a TransformerConfig that cannot be built."""
    for field, choices in (
        ("form", FORMS), ("mixer", ("attention", *MIXERS)), ("activation", [*ACTIVATIONS]),
        ("norm", [*NORMS]), ("norm_placement", NORM_PLACEMENTS),
        ("positions", (*POSITIONS, *TURNS)), ("dtype", DTYPES), ("bias", BIASES),
        ("remat", REMAT_POLICIES), ("attention", ATTENTIONS), ("expert_scores", EXPERT_SCORES),
    ):
        _check_choice(field, getattr(config, field), choices)
    if config.rope_scaling is not None:
        _check_choice("rope_scaling", config.rope_scaling, ROPE_SCALINGS)
    for field in (
        "vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim",
        "mlp_dim", "max_length", "scan_unroll",
    ):
        if getattr(config, field) < 1:
            raise ValueError(f"model.{field}={getattr(config, field)}: expected at least 1")
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"model.num_kv_heads={config.num_kv_heads} must divide model.num_heads="
            f"{config.num_heads}: choose one of {_divisors(config.num_heads)}"
        )
    if config.positions in ("rope", "sinusoidal"):
        field = "head_dim" if config.positions == "rope" else "model_dim"
        if getattr(config, field) % 2:
            raise ValueError(
                f"model.{field}={getattr(config, field)} must be even for "
                f"model.positions='{config.positions}', which rotates pairs"
            )
    for field in ("saved", "offloaded"):
        for name in getattr(config, field):
            _check_choice(field, name, TENSOR_NAMES)
        if getattr(config, field) and config.remat != "names":
            raise ValueError(
                f"model.{field}={getattr(config, field)} has no effect with model.remat="
                f"{config.remat!r}: set model.remat='names'"
            )
    if config.token_types is not None and config.token_types < 1:
        raise ValueError(f"model.token_types={config.token_types}: expected at least 1, or None")
    both = set(config.saved) & set(config.offloaded)
    if both:
        raise ValueError(f"model.saved and model.offloaded both name {', '.join(sorted(both))}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"model.dropout={config.dropout}: expected 0 <= dropout < 1")
    _check_pattern(config)
    _check_experts(config)
    _check_latent(config)
    _check_discriminator(config)
    _check_form(config)
    _check_mixer(config)


def _check_form(config: Any) -> None:
    two = config.form == "encoder_decoder"
    if two != (config.encoder_layers is not None) or (two and config.encoder_layers < 1):
        raise ValueError(
            f"model.encoder_layers={config.encoder_layers} with model.form={config.form!r}: "
            "expected at least 1 for 'encoder_decoder', and None for the others"
        )
    for field in ("num_experts", "window", "latent_rank"):
        if two and getattr(config, field) is not None:
            raise ValueError(
                f"model.{field}={getattr(config, field)} does not know model.form="
                "'encoder_decoder': leave it None, or choose another model.form"
            )
    if two and config.norm_placement == "parallel":
        raise ValueError(
            "model.norm_placement='parallel' does not know model.form='encoder_decoder': choose "
            "another of the two"
        )
    for field, usual in (("num_experts", None), ("encoder_layers", None)):
        if config.shared_layers and getattr(config, field) != usual:
            raise ValueError(
                f"model.{field}={getattr(config, field)} does not know model.shared_layers=True: "
                "leave one of them out"
            )
    if config.scale_logits and config.head_transform:
        raise ValueError(
            "model.scale_logits=True does not know the norm of model.head_transform=True: leave one "
            "of them out"
        )
    if config.future_heads < 0 or (config.future_heads and config.form != "decoder"):
        raise ValueError(
            f"model.future_heads={config.future_heads} with model.form={config.form!r}: expected "
            "at least 0, and 0 for all but a 'decoder'"
        )
    if config.future_heads and config.num_experts is not None:
        raise ValueError(
            f"model.future_heads={config.future_heads} does not know model.num_experts="
            f"{config.num_experts}: leave one of them out"
        )
    if config.embedding_dim is not None and not (
        config.embedding_dim > 0 and (config.head_transform or config.discriminator)
        and config.tied_embeddings
    ):
        raise ValueError(
            f"model.embedding_dim={config.embedding_dim}: expected at least 1, and "
            "model.head_transform=True with model.tied_embeddings=True, which lead back to it, or "
            "model.discriminator=True, which has no logits"
        )


def _check_discriminator(config: Any) -> None:
    heads = config.generator_heads
    if not config.discriminator:
        if heads is not None:
            raise ValueError(
                f"model.generator_heads={heads} has no effect without model.discriminator=True: "
                "set it, or leave it None"
            )
        return
    known = [("form", "encoder"), ("head_transform", False), ("tied_embeddings", True),
             ("scale_logits", False),
             ("logit_soft_cap", None)]
    if heads is not None:
        known += [("num_experts", None), ("latent_rank", None), ("shared_layers", False)]
    for field, only in known:
        if getattr(config, field) != only:
            with_generator = "" if heads is None else f" and model.generator_heads={heads}"
            raise ValueError(
                f"model.{field}={getattr(config, field)!r} does not know model.discriminator=True"
                f"{with_generator}: set model.{field}={only!r}"
            )
    if heads is None:
        return
    if config.positions == "relative":
        raise ValueError(
            f"model.positions='relative' does not know model.generator_heads={heads}: choose "
            "another of the two"
        )
    if not 1 <= heads < config.num_heads:
        raise ValueError(
            f"model.generator_heads={heads}: expected 1 to model.num_heads - 1="
            f"{config.num_heads - 1}; a third or a quarter of them is usual"
        )
    for field in ("model_dim", "mlp_dim", "num_kv_heads"):
        if getattr(config, field) * heads % config.num_heads:
            raise ValueError(
                f"model.{field}={getattr(config, field)} * model.generator_heads={heads} / "
                f"model.num_heads={config.num_heads} is the generator's, and no whole number: "
                "choose sizes that divide"
            )


def _check_mixer(config: Any) -> None:
    if config.mixer == "attention":
        return
    for field, usual in (
        ("form", "decoder"), ("latent_rank", None), ("qk_norm", False), ("attention_sinks", False),
        ("attention_soft_cap", None), ("attention_scale", None), ("future_heads", 0),
    ):
        if getattr(config, field) != usual:
            raise ValueError(
                f"model.{field}={getattr(config, field)!r} does not know model.mixer="
                f"{config.mixer!r}: leave it {usual!r}"
            )


def _check_experts(config: Any) -> None:
    if config.num_experts is None:
        for field, default in (
            ("shared_experts", 0), ("expert_scores", "softmax"), ("router_bias", False),
            ("expert_groups", 1), ("groups_per_token", 1),
            ("routed_scale", 1.0), ("dense_layers", 0), ("dense_mlp_dim", None),
        ):
            if getattr(config, field) != default:
                raise ValueError(
                    f"model.{field}={getattr(config, field)!r} has no effect without experts: "
                    f"set model.num_experts, or leave model.{field}={default!r}"
                )
        return
    if not 1 <= config.experts_per_token <= config.num_experts:
        raise ValueError(
            f"model.experts_per_token={config.experts_per_token}: expected 1 to "
            f"model.num_experts={config.num_experts}"
        )
    if config.shared_experts < 0:
        raise ValueError(f"model.shared_experts={config.shared_experts}: expected at least 0")
    _check_groups(config)
    _check_dense_layers(config)
    if config.bias == "all":
        raise ValueError(
            "model.bias='all': experts have no biases; set model.bias='none' or 'qkv'"
        )


def _check_groups(config: Any) -> None:
    groups, taken, experts = config.expert_groups, config.groups_per_token, config.num_experts
    if groups < 1 or experts % groups or (groups > 1 and experts // groups < 2):
        raise ValueError(
            f"model.expert_groups={groups} must divide model.num_experts={experts} into groups of "
            f"at least 2: choose one of {[1, *(n for n in _divisors(experts)[1:] if 2 * n <= experts)]}"
        )
    if not 1 <= taken <= groups or config.experts_per_token > taken * experts // groups:
        raise ValueError(
            f"model.groups_per_token={taken}: expected 1 to model.expert_groups={groups}, and room "
            f"for model.experts_per_token={config.experts_per_token} in groups of "
            f"{experts // groups}"
        )


def _check_dense_layers(config: Any) -> None:
    if not 0 <= config.dense_layers < config.num_layers:
        raise ValueError(
            f"model.dense_layers={config.dense_layers}: expected 0 to model.num_layers - 1="
            f"{config.num_layers - 1}"
        )
    if (config.dense_layers > 0) != (config.dense_mlp_dim is not None):
        raise ValueError(
            f"model.dense_layers={config.dense_layers} and model.dense_mlp_dim="
            f"{config.dense_mlp_dim} go together: set both or neither"
        )
    if config.dense_layers and len(config.layer_pattern) > 1:
        raise ValueError(
            f"model.layer_pattern={config.layer_pattern}: layers before those with experts "
            "(model.dense_layers) know one kind of layer"
        )


def _check_latent(config: Any) -> None:
    others = ("query_rank", "rope_dim", "value_dim")
    if config.latent_rank is None:
        for field in others:
            if getattr(config, field) is not None:
                raise ValueError(
                    f"model.{field}={getattr(config, field)} has no effect without latent "
                    f"attention: set model.latent_rank, or model.{field}=None"
                )
        return
    for field, most in (
        ("latent_rank", math.inf), ("query_rank", math.inf), ("rope_dim", config.head_dim - 1),
        ("value_dim", config.head_dim),
    ):
        value = getattr(config, field)
        if field == "query_rank" and value is None:
            continue
        if value is None or not 1 <= value <= most:
            raise ValueError(
                f"model.{field}={value}: latent attention (model.latent_rank) needs at least 1 "
                f"and at most {most} (model.head_dim={config.head_dim})"
            )
    if config.rope_dim % 2:
        raise ValueError(f"model.rope_dim={config.rope_dim} must be even: pairs are rotated")
    for field, only in (
        ("positions", "rope"), ("bias", "none"), ("qk_norm", False), ("attention_sinks", False),
        ("num_kv_heads", config.num_heads),
    ):
        if getattr(config, field) != only:
            raise ValueError(
                f"model.{field}={getattr(config, field)!r} is not known with latent attention: "
                f"set model.{field}={only!r}, or model.latent_rank=None"
            )


def _check_pattern(config: Any) -> None:
    if not config.layer_pattern:
        raise ValueError("model.layer_pattern=(): expected at least one of 'global', 'local'")
    for kind in config.layer_pattern:
        _check_choice("layer_pattern", kind, [*LAYER_KINDS])
    if "local" in config.layer_pattern and (config.window is None or config.window < 1):
        raise ValueError(
            f"model.window={config.window}: a 'local' layer in model.layer_pattern needs a "
            "window of at least 1 token"
        )
    if "local" not in config.layer_pattern and config.window is not None:
        raise ValueError(
            f"model.window={config.window} has no effect: no layer of model.layer_pattern="
            f"{config.layer_pattern} is 'local'; unset model.window or add one"
        )
    if config.local_rope_base is None:
        return
    if config.positions != "rope" or "local" not in config.layer_pattern:
        raise ValueError(
            f"model.local_rope_base={config.local_rope_base} has no effect: it needs "
            "model.positions='rope' and a 'local' layer in model.layer_pattern"
        )


def _check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        own = ", or FILE.py:NAME of your own" if field in OWN else ""
        raise ValueError(
            f"model.{field}={value!r}: expected one of {', '.join(choices)}{own}{hint}")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
