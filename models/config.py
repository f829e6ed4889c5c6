"""The sizes and choices of one Transformer."""

import dataclasses

from batiste.fields import Config, check_types
from batiste.models.config_checks import check
from batiste.models.parts import ACTIVATIONS


@dataclasses.dataclass
class TransformerConfig(Config):
    """One Transformer; presets in configs/ fill it in. Sizes are counts."""

    # decoder: sees the past; encoder: sees all of a document; encoder_decoder: a decoder, each of
    # whose `num_layers` attends to an encoder of `encoder_layers`
    form: str = "decoder"
    encoder_layers: int | None = None  # layers of the encoder of an encoder_decoder
    vocab_size: int = 4096  # rows of the token embedding
    num_layers: int = 6  # layers of the decoder, or of an encoder alone
    shared_layers: bool = False  # one layer, applied num_layers times (ALBERT, arXiv:1909.11942)
    model_dim: int = 384  # size of a token's vector between layers
    num_heads: int = 6  # heads of queries
    num_kv_heads: int = 6  # heads of keys and values; divides num_heads
    head_dim: int = 64  # size of a head
    mlp_dim: int = 1536  # units of the feed-forward, or of each expert
    max_length: int = 256  # most tokens of a row

    num_experts: int | None = None  # experts of every layer's feed-forward; None: one dense one
    experts_per_token: int = 2  # experts that a token takes
    shared_experts: int = 0  # all tokens also take a dense feed-forward of so many times mlp_dim
    expert_groups: int = 1  # groups of experts, the best of which are chosen from first
    groups_per_token: int = 1  # groups, of those whose best two experts are best
    expert_scores: str = "softmax"  # softmax over experts, or sigmoid of each
    router_bias: bool = False  # a bias that takes part in the choice of experts and nothing else
    routed_scale: float = 1.0  # multiplies what the chosen experts say
    dense_layers: int = 0  # first layers without experts (DeepSeek-V3, arXiv:2412.19437)
    dense_mlp_dim: int | None = None  # units of the feed-forward of those

    latent_rank: int | None = None  # size of what keys and values are made of; None: no latents
    query_rank: int | None = None  # the same of queries; None: they are made of the token itself
    rope_dim: int | None = None  # the last dims of a head, which are rotated, with latent_rank
    value_dim: int | None = None  # size of a value, with latent_rank

    # relu, relu2, gelu (tanh), gelu_exact, silu; gated: swiglu, geglu; or FILE.py:NAME
    activation: str = "swiglu"
    norm: str = "rms"  # rms, rms_plus_one (its scale is stored less 1: Gemma), layer, or FILE.py:NAME
    # pre, post, sandwich, or parallel: one norm feeds attention and feed-forward, and both are added
    # at once (PaLM, arXiv:2204.02311)
    norm_placement: str = "pre"
    norm_epsilon: float = 1e-6  # added to the mean of squares
    # which products have a bias: none, qkv (queries, keys, values), or all, and then LayerNorms too
    bias: str = "none"
    qk_norm: bool = False  # queries and keys are normalized by head
    embedding_norm: bool = False  # embeddings are normalized before the first layer

    # rope, learned, sinusoidal, alibi, none, FILE.py:NAME, or relative: a number by head and distance
    # is added to the logits of self-attention, which all layers share (T5)
    positions: str = "rope"
    rope_base: float = 10_000.0  # base of the rotations' wave lengths
    local_rope_base: float | None = None  # that of local layers, which are then not scaled
    rope_scaling: str | None = None  # linear, llama3 or yarn: for rows longer than trained on
    rope_factor: float = 8.0  # how many times longer
    rope_original_length: int = 8192  # tokens of a row before scaling (llama3, yarn)

    mixer: str = "attention"  # what mixes the tokens of a row; or FILE.py:NAME (docs/extend.md)
    # kinds of layers, repeated over the depth: global, local, or FILE.py:NAME
    layer_pattern: tuple[str, ...] = ("global",)
    window: int | None = None  # tokens that a local layer sees, itself included
    # reference, the chip whose kernels to use, or auto: those of the device, where they are certified
    attention: str = "reference"
    attention_scale: float | None = None  # multiplies queries by keys; None: 1 / sqrt(head_dim)
    attention_soft_cap: float | None = None  # attention logits are cap * tanh(logit / cap)
    attention_sinks: bool = False  # a learned logit for each head that takes part in the softmax
    logit_soft_cap: float | None = None  # the same as attention_soft_cap, of the logits of tokens

    token_types: int | None = None  # kinds of tokens, each with an embedding added (BERT's segments)
    embedding_dim: int | None = None  # size of embeddings; a product makes model_dim of it (ALBERT)
    tied_embeddings: bool = True  # the output matrix is the token embedding
    head_transform: bool = False  # product, activation, norm before the logits, and a bias (BERT)
    # the head says of each token whether it was replaced; no logits (ELECTRA, arXiv:2003.10555)
    discriminator: bool = False
    # heads of the generator that replaces tokens for it, narrower in this proportion
    generator_heads: int | None = None
    # layers beside each other after the last that predict the second next token and so on
    # (arXiv:2404.19737)
    future_heads: int = 0
    scale_embeddings: bool = False  # embeddings are multiplied by sqrt(model_dim) (Gemma)
    scale_logits: bool = False  # logits are divided by sqrt(model_dim) (T5, arXiv:1910.10683)
    dropout: float = 0.0  # share of activations that are set to 0 in training
    init_stddev: float | None = None  # of initial matrices; None: 1 / sqrt(inputs)
    depth_scaled_init: bool = True  # products into the residual stream begin smaller by depth

    dtype: str = "float32"  # of the computation; parameters are stored in float32
    # what the backward pass finds saved: none recomputes nothing, dots all but products with weights,
    # full everything, names all but the tensors named in `saved` and `offloaded`
    remat: str = "none"
    saved: tuple[str, ...] = ()  # tensors of a layer that stay on the device: see TENSOR_NAMES
    offloaded: tuple[str, ...] = ()  # tensors of a layer that go to the host's memory
    scan_unroll: int = 1  # layers in the body of the scan over depth

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
        check_types(self, "model.")
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
