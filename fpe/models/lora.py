"""LoRA adapters of peft on expanded layers.

An adapter belongs to the parent: ``B @ A`` has the parent's shape, and each child takes the entries of its own edges.
So an adapter has as many weights as on the dense model and fits both models; merging it leaves removed weights at zero.
Importing this module imports peft.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.functional import linear

from ..layers import KINDS


def adapted(config: LoraConfig) -> LoraConfig:
    """Makes a configuration of peft's LoRA know the expanded layers; changes and returns it.

    Both adapting a model and loading an adapter need it::

        model = get_peft_model(wide, adapted(LoraConfig(target_modules=["up_proj", "down_proj"])))
        model = PeftModel.from_pretrained(wide, folder, config=adapted(LoraConfig.from_pretrained(folder)))
    """
    config._register_custom_module(dict.fromkeys(KINDS, ExpandedLora))
    return config


class ExpandedLora(Linear):
    """An expanded layer with adapters: ``layer(x) + scaling * dropout(x) @ (kept * tiled(B @ A)).T``.

    ``tiled`` repeats the parent's ``B @ A`` for every child, and ``kept`` is the layer's mask.

    Raises:
        ValueError: The configuration asks for ``lora_bias``, ``fan_in_fan_out``, or an initialization by name.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> None:
        if config.lora_bias or config.fan_in_fan_out or isinstance(config.init_lora_weights, str):
            raise ValueError(
                "LoRA on an expanded layer: lora_bias, fan_in_fan_out and an init_lora_weights that is given by name "
                f"are not supported, got {config.lora_bias}, {config.fan_in_fan_out}, {config.init_lora_weights!r}"
            )
        super().__init__(base_layer, adapter_name, config, **options)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        """The parent's sizes."""
        children_out, children_in = module.planes
        return module.in_features // children_in, module.out_features // children_out

    @property
    def lora_variants(self) -> dict:
        """Plain LoRA alone."""
        return {(): None}

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the wide weight, ``[out_features, in_features]``, zero where no edge is kept."""
        base = self.get_base_layer()
        delta = self.lora_B[adapter].weight @ self.lora_A[adapter].weight * self.scaling[adapter]
        return torch.where(base.kept(), delta.repeat(*base.planes), delta.new_zeros(()))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the kept weights.

        Raises:
            ValueError: ``safe_merge`` is set, and a merged weight is not finite.
        """
        base = self.get_base_layer()
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.lora_A:
                weight = base.wide_weight() + self.get_delta_weight(adapter).to(base.edge_weight.dtype)
                if safe_merge and not bool(weight.isfinite().all()):
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
                base.set_wide_weight(weight)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtracts what was merged."""
        base = self.get_base_layer()
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            base.set_wide_weight(base.wide_weight() - self.get_delta_weight(adapter).to(base.edge_weight.dtype))

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The layer, with its active adapters."""
        self._check_forward_args(x, *args, **options)
        if options.get("adapter_names") is not None:
            raise ValueError("LoRA on an expanded layer: a batch has one set of adapters, got adapter_names")
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x)
        if not self.disable_adapters and not self.merged:
            for adapter in self.active_adapters:
                if adapter in self.lora_A:
                    inputs = self.lora_dropout[adapter](self._cast_input_dtype(x, self.lora_A[adapter].weight.dtype))
                    result = result + linear(inputs, self.get_delta_weight(adapter)).to(result.dtype)
        return result
