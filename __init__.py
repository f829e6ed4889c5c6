"""Batiste: train Transformer language models in JAX, from raw text to samples.

The folders beside this file are the rooms of the package; `import batiste` alone imports none of
them, so it is quick and touches no device.
"""

__version__ = "0.1.0"
