"""Attention kernels: arrays and numbers in, arrays out; no config, no mesh."""

from batiste.pallas_kernels.mask import AttentionMask
from batiste.pallas_kernels.reference import reference_attention

__all__ = ["AttentionMask", "reference_attention"]
