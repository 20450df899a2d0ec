"""LoRA adapters of peft on expanded layers, and quantization by torchao."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, ids
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fpe
from fpe.layers import ExpandedLinear
from fpe.models.lora import ExpandedLora, adapted

NAMES = ["gate_proj", "up_proj", "down_proj"]
POLICIES: list[dict[str, Any]] = [
    {"resparsify": "partition"},
    {"resparsify": "magnitude"},
    {"structure": "block", "block": (4, 4), "resparsify": "partition"},
]


def llama() -> Any:
    torch.manual_seed(0)
    return ARCHITECTURES[0].make().eval()


def expanded(dense: nn.Module, **options: Any) -> Any:
    return fpe.expand(dense, generator=torch.Generator().manual_seed(0), **options).eval()


def config(**options: Any) -> LoraConfig:
    return adapted(LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False, **options))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


@pytest.mark.parametrize("options", POLICIES, ids=str)
def test_adapters_train_merge_and_unload(options: dict, tmp_path: Path) -> None:
    wide = expanded(llama(), **options)
    plain, count = logits(wide), fpe.nonzeros(wide)
    torch.manual_seed(0)
    model = get_peft_model(wide, config(lora_dropout=0.1))
    assert sum(isinstance(m, ExpandedLora) for m in model.modules()) == 6
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model.train()
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_" in n)
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)
    optimizer.step()
    model.eval()
    tuned = logits(model)
    assert not torch.allclose(tuned, plain)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain)
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), tuned, rtol=1e-4, atol=1e-5)
    assert fpe.nonzeros(merged) == count
    assert not any(isinstance(m, ExpandedLora) for m in merged.modules())
    for layer in merged.modules():
        if isinstance(layer, ExpandedLinear):
            assert torch.equal(layer.weight != 0, layer.kept())
    again = PeftModel.from_pretrained(
        expanded(llama(), **options), tmp_path, config=adapted(LoraConfig.from_pretrained(tmp_path))
    )
    torch.testing.assert_close(logits(again), tuned)


def test_the_dense_models_adapter_fits_the_expanded_model(tmp_path: Path) -> None:
    """Every edge gets what the dense model's weight gets."""
    dense = llama()
    tuned = get_peft_model(llama(), LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False))
    tuned.save_pretrained(tmp_path)
    wide = expanded(dense, resparsify="partition")
    loaded = PeftModel.from_pretrained(wide, tmp_path, config=adapted(LoraConfig.from_pretrained(tmp_path)))
    merged, parent = loaded.merge_and_unload(), tuned.merge_and_unload()
    for layer in range(2):
        for name in NAMES:
            path = f"model.layers.{layer}.mlp.{name}"
            ours, theirs = merged.get_submodule(path), parent.get_submodule(path).weight
            folded = ours.weight.unflatten(0, (ours.planes[0], -1)).sum(0)
            folded = folded.unflatten(1, (ours.planes[1], -1)).sum(1)
            torch.testing.assert_close(folded, theirs)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_what_an_expanded_layer_cannot_have_is_refused(options: dict) -> None:
    asked = adapted(LoraConfig(r=4, target_modules=["down_proj"], **options))
    with pytest.raises(ValueError, match=r"expanded layer|variant"):
        get_peft_model(expanded(llama()), asked)


def test_torchao_is_refused_by_name_and_takes_the_dense_twin() -> None:
    wide = expanded(llama())

    def ours(module: nn.Module, name: str) -> bool:
        return isinstance(module, ExpandedLinear)

    with pytest.raises(TypeError, match=r"SplitLinear.*to_dense"):
        quantize_(wide, Int8WeightOnlyConfig(), filter_fn=ours)
    twin = fpe.to_dense(wide)
    before = logits(twin)
    quantize_(twin, Int8WeightOnlyConfig())
    assert (logits(twin) - before).norm() < 0.05 * before.norm()
