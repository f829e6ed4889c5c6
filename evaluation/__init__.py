"""How good a model is."""

from batiste.evaluation.perplexity import (
    Detection, Perplexity, RowSums, make_row_losses, perplexity,
)

__all__ = ["Detection", "Perplexity", "RowSums", "make_row_losses", "perplexity"]
