"""Attention kernels: arrays and numbers in, arrays out; no config, no mesh."""

from batiste.pallas_kernels.mask import AttentionMask, BlockSparsity
from batiste.pallas_kernels.reference import reference_attention

__all__ = ["AttentionMask", "BlockSparsity", "reference_attention"]
