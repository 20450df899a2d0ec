"""Models that people have: which of their layers are expanded, and how an expanded model is saved and loaded.

==================  ===========================================================================================
:mod:`.table`         which layers of known blocks belong together
:mod:`.discovery`     which layers of a model would be expanded, and why the others would not
:mod:`.tracing`       the same for unknown models, from one forward pass
==================  ===========================================================================================
"""

from .discovery import Found, find_pairs

__all__ = ["Found", "find_pairs"]
