"""The sizes and choices of one Transformer."""

import dataclasses

from batiste.models.config_checks import check
from batiste.models.parts import ACTIVATIONS


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
    `mixer` is what mixes the tokens of a row: attention, or a part of your own (docs/extend.md).
    `attention_scale` multiplies queries by keys (None: 1 / sqrt(head_dim)).
    `attention` names the chip whose kernels to use; "auto" is settled by `resolve_attention`.
    `embedding_dim`: what is embedded has so many dims, and a product makes `model_dim` of them
    (ALBERT).
    `scale_embeddings` multiplies what is embedded by sqrt(model_dim) (Gemma), `scale_logits` divides
    the logits by it (T5, arXiv:1910.10683).
    `token_types`: kinds of tokens, told apart by what is added to their embeddings (BERT's
    segments).
    `head_transform`: a product, an activation and a norm before the logits, which get a bias
    (BERT).
    `discriminator`: its head says of each token whether it was replaced, and there are no logits
    (ELECTRA, arXiv:2003.10555). `generator_heads`: beside it is a `generator` with so many heads,
    narrower than it in the same proportion, which replaces hidden tokens while it is trained.
    `shared_layers`: all layers are one, applied `num_layers` times (ALBERT, arXiv:1909.11942).
    `future_heads`: layers beside each other after the last, which predict the second next token
    and so on by the same logits (arXiv:2404.19737).
    With `num_experts` every layer's feed-forward is a mixture of so many of size `mlp_dim`: a token
    takes `experts_per_token` of them by `expert_scores`, and one dense feed-forward of size
    `shared_experts` * `mlp_dim`. `router_bias` takes part in that choice and in nothing else;
    `routed_scale` multiplies what the chosen experts say. Experts in `expert_groups` are chosen
    within those `groups_per_token` of them whose best two are best. The first `dense_layers` have a
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
    expert_groups: int = 1
    groups_per_token: int = 1
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

    mixer: str = "attention"
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
    discriminator: bool = False
    generator_heads: int | None = None
    future_heads: int = 0
    scale_embeddings: bool = False
    scale_logits: bool = False
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
        return ACTIVATIONS[self.activation].gated

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
        check(self)

    @property
    def encoder(self) -> "TransformerConfig":
        """The config of the stack that reads the source."""
        return dataclasses.replace(
            self, form="encoder", num_layers=self.encoder_layers, encoder_layers=None)

    @property
    def generator(self) -> "TransformerConfig":
        """The config of what replaces tokens: as deep, its widths by the share of heads."""
        def share(size: int) -> int:
            return size * self.generator_heads // self.num_heads

        width, dim = self.sizes["R"], share(self.model_dim)
        return dataclasses.replace(
            self, discriminator=False, generator_heads=None, head_transform=True, model_dim=dim,
            num_heads=self.generator_heads, num_kv_heads=share(self.num_kv_heads),
            mlp_dim=share(self.mlp_dim), embedding_dim=None if width == dim else width)
