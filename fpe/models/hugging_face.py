"""Expanded models of transformers through ``save_pretrained`` and ``from_pretrained``.

transformers asks a quantizer to replace modules before a checkpoint is loaded: expansion is one, by the name ``"fpe"``. The
checkpoint itself says what every layer is (:mod:`fpe.layers.state`), so the configuration holds nothing but that name.

This module is imported when transformers has its registry of quantizers (:mod:`fpe.models.watch`).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import replacements
from ..layers import ExpandedLinear

METHOD = "fpe"


@register_quantization_config(METHOD)
class ExpansionConfig(QuantizationConfigMixin):
    """Says that a checkpoint is one of an expanded model."""

    def __init__(self, **others: Any) -> None:
        super().__init__(quant_method=METHOD)


@register_quantizer(METHOD)
class ExpansionQuantizer(HfQuantizer):
    """Puts the layers that a checkpoint holds in place of dense ones, before its weights are loaded."""

    def _process_model_before_weight_loading(self, model: nn.Module, **given: Any) -> None:
        files = given.get("checkpoint_files")
        if not self.pre_quantized or not files:
            raise ValueError(
                "fpe: from_pretrained loads what save_pretrained wrote of an expanded model; to expand a dense one, load "
                "it and call fpe.expand. A state_dict is taken by fpe.restore"
            )
        with _Files(files) as state:
            named = _Renamed(state, getattr(model, "base_model_prefix", ""), dict(model.named_modules()))
            layers = replacements(model, named)
        expanded = [name for name in state if name.endswith("._extra_state")]
        found = sum(isinstance(inner, ExpandedLinear) for layer in layers.values() for inner in layer.modules())
        if found != len(expanded):
            raise ValueError(
                f"fpe: the checkpoint has {len(expanded)} expanded layers, of which {found} have a place in a "
                f"{type(model).__name__}, as {expanded[0]!r} has none" if expanded else "fpe: no expanded layer"
            )
        for name, layer in layers.items():
            model.set_submodule(name, layer.to("meta"))

    def _process_model_after_weight_loading(self, model: nn.Module, **given: Any) -> None:
        for layer in model.modules():
            if isinstance(layer, ExpandedLinear):
                layer.settle()

    def is_serializable(self) -> bool:
        """It is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """It is: expanded layers train like dense ones."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether all weights train, not adapters alone."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the forward."""
        return True


def note_expansion(model: nn.Module) -> None:
    """Has ``save_pretrained`` of the models of transformers in an expanded model write what ``from_pretrained`` needs."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        model.config.quantization_config = ExpansionConfig()
        return
    for child in model.children():
        note_expansion(child)
