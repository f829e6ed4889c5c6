"""Attention and the loss of the head as kernels: arrays and numbers in, arrays out; no config."""

from batiste.pallas_kernels.attention import flash_attention, of_loss, sinks_gradient
from batiste.pallas_kernels.cross_entropy import fused_cross_entropy, reference_cross_entropy
from batiste.pallas_kernels.decode import decode_is_certified, flash_decode
from batiste.pallas_kernels.mask import AttentionMask, BlockSparsity
from batiste.pallas_kernels.operands import Operands, Options
from batiste.pallas_kernels.pieces import attend_piece, attend_piece_gradients, merge
from batiste.pallas_kernels.reference import reference_attention, reference_logits

__all__ = [
    "AttentionMask", "BlockSparsity", "Operands", "Options", "attend_piece",
    "attend_piece_gradients", "decode_is_certified", "flash_attention", "flash_decode",
    "fused_cross_entropy", "merge", "of_loss", "reference_attention", "reference_cross_entropy",
    "reference_logits", "sinks_gradient",
]
