"""Weights of which any entries exist: a bit for each position, and the kept values packed in order."""

from .api import pack_values, unpack_values
from .eager import pack_values_eager, unpack_values_eager
from .layout import Bitmap

__all__ = ["Bitmap", "pack_values", "pack_values_eager", "unpack_values", "unpack_values_eager"]
