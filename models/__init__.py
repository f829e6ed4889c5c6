"""The network: token arrays in, logits out."""

from batiste.models.attention_choice import resolve_attention
from batiste.models.chunked_loss import Rows
from batiste.models.config import TransformerConfig
from batiste.models.generator import PARTS, alone
from batiste.models.layer_sums import AttentionSums, LayerSums
from batiste.models.mixture import rebalanced
from batiste.models.parameter import letters_tree
from batiste.models.parts import (
    ACTIVATIONS, LAYER_KINDS, MIXERS, NORMS, TURNS, Activation, Turn,
)
from batiste.models.positions import LLAMA3_FACTORS, YARN_TURNS, yarn_length
from batiste.models.router import RouterSums
from batiste.models.token_loss import LossRules, token_losses, vocabulary_sums
from batiste.models.transformer import Beside, Cache, Transformer

__all__ = [
    "ACTIVATIONS", "LAYER_KINDS", "LLAMA3_FACTORS", "MIXERS", "NORMS", "PARTS", "TURNS", "Activation",
    "AttentionSums", "Beside", "Cache", "LayerSums", "LossRules", "RouterSums", "Rows",
    "Transformer", "TransformerConfig", "Turn", "YARN_TURNS", "alone", "letters_tree",
    "rebalanced", "resolve_attention",
    "token_losses", "vocabulary_sums", "yarn_length",
]
