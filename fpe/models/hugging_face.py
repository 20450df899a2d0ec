"""Expanded models of transformers through ``save_pretrained`` and ``from_pretrained``.

transformers lets a quantizer replace modules before a checkpoint is loaded. Expansion is registered as one, named
``"fpe"``. The checkpoint itself says what every layer is (:mod:`fpe.layers.state`), so the configuration holds only
that name.

:mod:`fpe.companion` imports this module once transformers has its registry of quantizers.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import replacements
from ..layers import ExpandedLinear

METHOD = "fpe"
EXTRA = "._extra_state"


@register_quantization_config(METHOD)
class ExpansionConfig(QuantizationConfigMixin):
    """Says that a checkpoint is one of an expanded model."""

    def __init__(self, **others: Any) -> None:
        super().__init__(quant_method=METHOD)


@register_quantizer(METHOD)
class ExpansionQuantizer(HfQuantizer):
    """Puts the layers that a checkpoint holds in place of dense ones, before its weights are loaded."""

    def _process_model_before_weight_loading(self, model: nn.Module, **given: Any) -> None:
        files = given.get("checkpoint_files") or []
        if not self.pre_quantized or not files or not all(file.endswith(".safetensors") for file in files):
            raise ValueError(
                "fpe: from_pretrained reads the safetensors that save_pretrained wrote of an expanded model. To expand "
                "a dense model, load it and call fpe.expand; a state dict is taken by fpe.restore"
            )
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
            state = _Entries({key: file for file in opened for key in file.keys()}, model)  # noqa: SIM118
            layers = replacements(model, state)
        made = sum(isinstance(inner, ExpandedLinear) for layer in layers.values() for inner in layer.modules())
        expanded = [key for key in state if key.endswith(EXTRA)]
        if made != len(expanded):
            raise ValueError(
                f"fpe: the checkpoint has {len(expanded)} expanded layers, as '{expanded[0].removesuffix(EXTRA)}', and "
                f"a {type(model).__name__} has places for {made} of them"
            )
        for name, layer in layers.items():
            model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model: nn.Module, **given: Any) -> None:
        for layer in model.modules():
            if isinstance(layer, ExpandedLinear):
                layer.settle()

    def is_serializable(self) -> bool:
        """Yes: an expanded model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Expanded layers train as dense ones do."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """All of their weights train, not adapters alone."""
        return True

    @property
    def is_compileable(self) -> bool:
        """``generate`` may compile the forward."""
        return True


class _Entries(Mapping[str, Tensor]):
    """A checkpoint's entries by the model's names: topologies as they are, but only the shapes of weights.

    Weights are loaded later. Their stand-ins have the default dtype, which is the model's while transformers builds it.
    """

    def __init__(self, files: Mapping[str, Any], model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
        modules, prefix = {name for name, _ in model.named_modules()}, f"{getattr(model, 'base_model_prefix', '')}."
        self.places: dict[str, tuple[Any, str]] = {}
        for key, file in files.items():
            name, _ = rename_source_key(key, renamings, [])
            for candidate in (name, prefix + name, name.removeprefix(prefix)):
                if any(candidate.rpartition(".")[0].removesuffix(end) in modules for end in ("", ".0", ".1")):
                    name = candidate
                    break
            self.places[name] = (file, key)

    def __getitem__(self, name: str) -> Tensor:
        file, key = self.places[name]
        if name.endswith(EXTRA):
            return file.get_tensor(key)
        return torch.empty(file.get_slice(key).get_shape(), device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def note_expansion(models: Iterable[nn.Module]) -> None:
    """Marks models of transformers, also inside others, so that ``from_pretrained`` knows that they are expanded."""
    from transformers import PreTrainedModel

    for model in models:
        if isinstance(model, PreTrainedModel):
            model.config.quantization_config = ExpansionConfig()
        else:
            note_expansion(model.children())
