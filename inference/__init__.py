"""Text from a trained model: sampling and cached generation."""

from batiste.inference.config import SamplingConfig
from batiste.inference.generate import generate

__all__ = ["SamplingConfig", "generate"]
