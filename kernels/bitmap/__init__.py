"""Weights of which any entries exist: in bits or by a function of a seed, and the kept values packed in order."""

from .api import pack_values, unpack_values
from .eager import pack_values_eager, unpack_values_eager
from .holes import SeededHoles
from .layout import Bitmap

__all__ = ["Bitmap", "SeededHoles", "pack_values", "pack_values_eager", "unpack_values", "unpack_values_eager"]
