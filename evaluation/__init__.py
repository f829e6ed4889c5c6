"""How good a model is."""

from batiste.evaluation.perplexity import Perplexity, RowSums, make_row_losses, perplexity

__all__ = ["Perplexity", "RowSums", "make_row_losses", "perplexity"]
