"""The sizes and choices of one Transformer."""

import dataclasses
import difflib
import math
from collections.abc import Sequence

from batiste.pallas_kernels import certified

FORMS = ("decoder", "encoder", "encoder_decoder")
ACTIVATIONS = ("relu", "relu2", "gelu", "gelu_exact", "swiglu", "geglu")
NORMS = ("rms", "rms_plus_one", "layer")
NORM_PLACEMENTS = ("pre", "post", "sandwich", "parallel")
BIASES = ("none", "qkv", "all")
POSITIONS = ("rope", "learned", "sinusoidal", "alibi", "relative", "none")
ROPE_SCALINGS = ("linear", "llama3")
LAYER_KINDS = ("global", "local")
REMAT_POLICIES = ("none", "dots", "full", "names")
# What a layer names while it runs, for `saved` and `offloaded`.
TENSOR_NAMES = ("query", "key", "value", "attended", "attention", "up", "gate", "feed_forward")
EXPERT_SCORES = ("softmax", "sigmoid")
DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "reference", *certified.CHIPS)


@dataclasses.dataclass
class TransformerConfig:
    """One Transformer; presets in configs/ fill it in.

    `form`: a "decoder" sees the past, an "encoder" all of a document; an "encoder_decoder" has
    `encoder_layers` of the latter, to which each of its `num_layers` attends.
    Positions "relative" add a number to the logits of self-attention, by head and distance, which
    all layers share (T5).
    Sizes are counts. `window` is in tokens and applies to the "local" layers of `layer_pattern`,
    which repeats over the depth. `dtype` is the compute dtype; parameters are stored in float32.
    `remat` says what of a layer the backward pass finds saved: "none" recomputes nothing, "dots" all
    but products with weights, "full" everything, "names" everything but the tensors named in `saved`
    and, moved to the host's memory, in `offloaded` (see TENSOR_NAMES).
    `bias` says which products have one: none, those to queries, keys and values, or all, and then
    LayerNorms too. Norm "rms_plus_one" stores its scale less 1 (Gemma). Placed "parallel", one norm
    feeds attention and feed-forward, and both are added at once (PaLM, arXiv:2204.02311).
    `local_rope_base` is the base of local layers, which are then not scaled (None: as the others).
    `attention_scale` multiplies queries by keys (None: 1 / sqrt(head_dim)).
    `attention` names the chip whose kernels to use; "auto" is settled by `resolve_attention`.
    `embedding_dim`: what is embedded has so many dims, and a product makes `model_dim` of them
    (ALBERT).
    `token_types`: kinds of tokens, told apart by what is added to their embeddings (BERT's
    segments).
    `head_transform`: a product, an activation and a norm before the logits, which get a bias
    (BERT).
    `shared_layers`: all layers are one, applied `num_layers` times (ALBERT, arXiv:1909.11942).
    `future_heads`: layers beside each other after the last, which predict the second next token
    and so on by the same logits (arXiv:2404.19737).
    With `num_experts` every layer's feed-forward is a mixture of so many of size `mlp_dim`: a token
    takes `experts_per_token` of them by `expert_scores`, and one dense feed-forward of size
    `shared_experts` * `mlp_dim`. `router_bias` takes part in that choice and in nothing else;
    `routed_scale` multiplies what the chosen experts say. The first `dense_layers` have a
    feed-forward of size `dense_mlp_dim` instead (DeepSeek-V3, arXiv:2412.19437).
    With `latent_rank` attention is that of `LatentAttention`: queries go through `query_rank`
    (None: through none), the last `rope_dim` of `head_dim` are rotated, values have `value_dim`.
    """

    form: str = "decoder"
    encoder_layers: int | None = None
    vocab_size: int = 4096
    num_layers: int = 6
    shared_layers: bool = False
    model_dim: int = 384
    num_heads: int = 6
    num_kv_heads: int = 6
    head_dim: int = 64
    mlp_dim: int = 1536
    max_length: int = 256

    num_experts: int | None = None
    experts_per_token: int = 2
    shared_experts: int = 0
    expert_scores: str = "softmax"
    router_bias: bool = False
    routed_scale: float = 1.0
    dense_layers: int = 0
    dense_mlp_dim: int | None = None

    latent_rank: int | None = None
    query_rank: int | None = None
    rope_dim: int | None = None
    value_dim: int | None = None

    activation: str = "swiglu"
    norm: str = "rms"
    norm_placement: str = "pre"
    norm_epsilon: float = 1e-6
    bias: str = "none"
    qk_norm: bool = False
    embedding_norm: bool = False

    positions: str = "rope"
    rope_base: float = 10_000.0
    local_rope_base: float | None = None
    rope_scaling: str | None = None
    rope_factor: float = 8.0
    rope_original_length: int = 8192

    layer_pattern: tuple[str, ...] = ("global",)
    window: int | None = None
    attention: str = "reference"
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    attention_sinks: bool = False
    logit_soft_cap: float | None = None

    token_types: int | None = None
    embedding_dim: int | None = None
    tied_embeddings: bool = True
    head_transform: bool = False
    future_heads: int = 0
    scale_embeddings: bool = False
    dropout: float = 0.0
    init_stddev: float | None = None
    depth_scaled_init: bool = True

    dtype: str = "float32"
    remat: str = "none"
    saved: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()
    scan_unroll: int = 1

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate beside its input projection."""
        return self.activation in ("swiglu", "geglu")

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer: `layer_pattern` over the depth."""
        pattern = self.layer_pattern
        return tuple(pattern[layer % len(pattern)] for layer in range(self.num_layers))

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter of the alphabet that this model's parameters use."""
        experts = {} if self.num_experts is None else {"E": self.num_experts}
        types = {} if self.token_types is None else {"P": self.token_types}
        return experts | types | {
            "V": self.vocab_size, "L": self.num_layers, "D": self.model_dim,
            "N": self.num_heads, "K": self.num_kv_heads, "H": self.head_dim,
            "F": self.mlp_dim, "T": self.max_length,
            "R": self.model_dim if self.embedding_dim is None else self.embedding_dim,
        }

    def validate(self) -> None:
        """Raises ValueError, naming the field and a fix, for a model that cannot be built."""
        for field, choices in (
            ("form", FORMS), ("activation", ACTIVATIONS), ("norm", NORMS),
            ("norm_placement", NORM_PLACEMENTS), ("positions", POSITIONS), ("dtype", DTYPES),
            ("bias", BIASES),
            ("remat", REMAT_POLICIES), ("attention", ATTENTIONS), ("expert_scores", EXPERT_SCORES),
        ):
            _check_choice(field, getattr(self, field), choices)
        if self.rope_scaling is not None:
            _check_choice("rope_scaling", self.rope_scaling, ROPE_SCALINGS)
        for field in (
            "vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim",
            "mlp_dim", "max_length", "scan_unroll",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)}: expected at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads={self.num_kv_heads} must divide model.num_heads="
                f"{self.num_heads}: choose one of {_divisors(self.num_heads)}"
            )
        if self.positions in ("rope", "sinusoidal"):
            field = "head_dim" if self.positions == "rope" else "model_dim"
            if getattr(self, field) % 2:
                raise ValueError(
                    f"model.{field}={getattr(self, field)} must be even for "
                    f"model.positions='{self.positions}', which rotates pairs"
                )
        for field in ("saved", "offloaded"):
            for name in getattr(self, field):
                _check_choice(field, name, TENSOR_NAMES)
            if getattr(self, field) and self.remat != "names":
                raise ValueError(
                    f"model.{field}={getattr(self, field)} has no effect with model.remat="
                    f"{self.remat!r}: set model.remat='names'"
                )
        if self.token_types is not None and self.token_types < 1:
            raise ValueError(f"model.token_types={self.token_types}: expected at least 1, or None")
        both = set(self.saved) & set(self.offloaded)
        if both:
            raise ValueError(f"model.saved and model.offloaded both name {', '.join(sorted(both))}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout}: expected 0 <= dropout < 1")
        self._validate_pattern()
        self._validate_experts()
        self._validate_latent()
        self._validate_form()

    def _validate_form(self) -> None:
        two = self.form == "encoder_decoder"
        if two != (self.encoder_layers is not None) or (two and self.encoder_layers < 1):
            raise ValueError(
                f"model.encoder_layers={self.encoder_layers} with model.form={self.form!r}: "
                "expected at least 1 for 'encoder_decoder', and None for the others"
            )
        for field in ("num_experts", "window", "latent_rank"):
            if two and getattr(self, field) is not None:
                raise ValueError(
                    f"model.{field}={getattr(self, field)} does not know model.form="
                    "'encoder_decoder': leave it None, or choose another model.form"
                )
        if two and self.norm_placement == "parallel":
            raise ValueError(
                "model.norm_placement='parallel' does not know model.form='encoder_decoder': choose "
                "another of the two"
            )
        for field, usual in (("num_experts", None), ("encoder_layers", None)):
            if self.shared_layers and getattr(self, field) != usual:
                raise ValueError(
                    f"model.{field}={getattr(self, field)} does not know model.shared_layers=True: "
                    "leave one of them out"
                )
        if self.future_heads < 0 or (self.future_heads and self.form != "decoder"):
            raise ValueError(
                f"model.future_heads={self.future_heads} with model.form={self.form!r}: expected "
                "at least 0, and 0 for all but a 'decoder'"
            )
        if self.future_heads and self.num_experts is not None:
            raise ValueError(
                f"model.future_heads={self.future_heads} does not know model.num_experts="
                f"{self.num_experts}: leave one of them out"
            )
        if self.embedding_dim is not None and not (
            self.embedding_dim > 0 and self.head_transform and self.tied_embeddings
        ):
            raise ValueError(
                f"model.embedding_dim={self.embedding_dim}: expected at least 1, and "
                "model.head_transform=True with model.tied_embeddings=True, which lead back to it"
            )

    @property
    def encoder(self) -> "TransformerConfig":
        """The config of the stack that reads the source."""
        return dataclasses.replace(
            self, form="encoder", num_layers=self.encoder_layers, encoder_layers=None)

    def _validate_experts(self) -> None:
        if self.num_experts is None:
            for field, default in (
                ("shared_experts", 0), ("expert_scores", "softmax"), ("router_bias", False),
                ("routed_scale", 1.0), ("dense_layers", 0), ("dense_mlp_dim", None),
            ):
                if getattr(self, field) != default:
                    raise ValueError(
                        f"model.{field}={getattr(self, field)!r} has no effect without experts: "
                        f"set model.num_experts, or leave model.{field}={default!r}"
                    )
            return
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"model.experts_per_token={self.experts_per_token}: expected 1 to "
                f"model.num_experts={self.num_experts}"
            )
        if self.shared_experts < 0:
            raise ValueError(f"model.shared_experts={self.shared_experts}: expected at least 0")
        self._validate_dense_layers()
        if self.bias == "all":
            raise ValueError(
                "model.bias='all': experts have no biases; set model.bias='none' or 'qkv'"
            )

    def _validate_dense_layers(self) -> None:
        if not 0 <= self.dense_layers < self.num_layers:
            raise ValueError(
                f"model.dense_layers={self.dense_layers}: expected 0 to model.num_layers - 1="
                f"{self.num_layers - 1}"
            )
        if (self.dense_layers > 0) != (self.dense_mlp_dim is not None):
            raise ValueError(
                f"model.dense_layers={self.dense_layers} and model.dense_mlp_dim="
                f"{self.dense_mlp_dim} go together: set both or neither"
            )
        if self.dense_layers and len(self.layer_pattern) > 1:
            raise ValueError(
                f"model.layer_pattern={self.layer_pattern}: layers before those with experts "
                "(model.dense_layers) know one kind of layer"
            )

    def _validate_latent(self) -> None:
        others = ("query_rank", "rope_dim", "value_dim")
        if self.latent_rank is None:
            for field in others:
                if getattr(self, field) is not None:
                    raise ValueError(
                        f"model.{field}={getattr(self, field)} has no effect without latent "
                        f"attention: set model.latent_rank, or model.{field}=None"
                    )
            return
        for field, most in (
            ("latent_rank", math.inf), ("query_rank", math.inf), ("rope_dim", self.head_dim - 1),
            ("value_dim", self.head_dim),
        ):
            value = getattr(self, field)
            if field == "query_rank" and value is None:
                continue
            if value is None or not 1 <= value <= most:
                raise ValueError(
                    f"model.{field}={value}: latent attention (model.latent_rank) needs at least 1 "
                    f"and at most {most} (model.head_dim={self.head_dim})"
                )
        if self.rope_dim % 2:
            raise ValueError(f"model.rope_dim={self.rope_dim} must be even: pairs are rotated")
        for field, only in (
            ("positions", "rope"), ("bias", "none"), ("qk_norm", False), ("attention_sinks", False),
            ("num_kv_heads", self.num_heads),
        ):
            if getattr(self, field) != only:
                raise ValueError(
                    f"model.{field}={getattr(self, field)!r} is not known with latent attention: "
                    f"set model.{field}={only!r}, or model.latent_rank=None"
                )

    def _validate_pattern(self) -> None:
        if not self.layer_pattern:
            raise ValueError("model.layer_pattern=(): expected at least one of 'global', 'local'")
        for kind in self.layer_pattern:
            _check_choice("layer_pattern", kind, LAYER_KINDS)
        if "local" in self.layer_pattern and (self.window is None or self.window < 1):
            raise ValueError(
                f"model.window={self.window}: a 'local' layer in model.layer_pattern needs a "
                "window of at least 1 token"
            )
        if "local" not in self.layer_pattern and self.window is not None:
            raise ValueError(
                f"model.window={self.window} has no effect: no layer of model.layer_pattern="
                f"{self.layer_pattern} is 'local'; unset model.window or add one"
            )
        if self.local_rope_base is None:
            return
        if self.positions != "rope" or "local" not in self.layer_pattern:
            raise ValueError(
                f"model.local_rope_base={self.local_rope_base} has no effect: it needs "
                "model.positions='rope' and a 'local' layer in model.layer_pattern"
            )


def _check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"model.{field}={value!r}: expected one of {', '.join(choices)}{hint}")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
