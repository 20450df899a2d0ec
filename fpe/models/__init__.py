"""Which layers of a model are expanded, and how other libraries save, load and adapt an expanded model.

==================  ===========================================================================================
:mod:`.table`         which layers of known blocks belong together
:mod:`.discovery`     which layers of a model would be expanded, and why the others would not
:mod:`.tracing`       the same for unknown models, from one forward pass
:mod:`.hugging_face`  ``save_pretrained`` and ``from_pretrained`` of transformers
:mod:`.lora`          LoRA adapters of peft
==================  ===========================================================================================
"""

from .discovery import Found, find_pairs

__all__ = ["Found", "find_pairs"]
