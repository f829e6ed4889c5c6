"""Models of other libraries: their files, their names for what our models have, and the proof."""

from batiste.interop.families import FAMILIES
from batiste.interop.family import Family, family_of, fitting_family
from batiste.interop.files import Tensors
from batiste.interop.weights import WeightMap

__all__ = ["FAMILIES", "Family", "Tensors", "WeightMap", "family_of", "fitting_family"]
