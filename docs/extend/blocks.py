"""An attention mask: near and first blocks. --config.model.layer_pattern="('docs/extend/blocks.py:blocks',)" """

import dataclasses

from batiste.models import TransformerConfig
from batiste.pallas_kernels import AttentionMask, BlockSparsity


def blocks(mask: AttentionMask, config: TransformerConfig) -> AttentionMask:
    """What a global layer sees, of the two nearest blocks of 8 tokens and of the first."""
    return dataclasses.replace(mask, sparsity=BlockSparsity(8, window_blocks=2, global_blocks=1))
