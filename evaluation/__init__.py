"""How good a model is."""

from batiste.evaluation.perplexity import Perplexity, make_row_losses, perplexity

__all__ = ["Perplexity", "make_row_losses", "perplexity"]
