"""The network: token arrays in, logits out."""

from batiste.models.attention_choice import resolve_attention
from batiste.models.config import TransformerConfig
from batiste.models.parameter import letters_tree
from batiste.models.transformer import Cache, Transformer

__all__ = ["Cache", "Transformer", "TransformerConfig", "letters_tree", "resolve_attention"]
