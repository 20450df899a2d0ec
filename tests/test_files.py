"""Expanded models as files, and what other tools are told."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import RECIPES, SIZES, BadCall, Recipe, each_recipe, integer_weights, mlp, seeded
from torch import nn

import fpe


@each_recipe
def test_a_file_brings_the_model_back(recipe: Recipe, tmp_path: Path) -> None:
    wide = recipe.expand(mlp(*SIZES))
    fpe.save(wide, tmp_path / "model.safetensors")
    restored = fpe.restore(mlp(*SIZES, seed=1), str(tmp_path / "model.safetensors"))
    x = torch.randn(3, SIZES[0], generator=seeded())
    assert torch.equal(restored(x), wide(x))
    assert [type(m) for m in restored] == [type(m) for m in wide]


def test_the_header_says_what_is_inside(tmp_path: Path) -> None:
    fpe.save(RECIPES[0].expand(mlp(*SIZES)), tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        header = json.loads(opened.metadata()["fpe"])
    assert header == {"version": fpe.layers.FORMAT_VERSION, "layers": {"0": "SplitLinear", "2": "MaskedLinear"}}


def test_shared_tensors_are_written_once(tmp_path: Path) -> None:
    def tied() -> nn.ModuleDict:
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"embedding": nn.Embedding(7, 24), "head": nn.Linear(24, 7, bias=False), "mlp": mlp(*SIZES)}
        )
        model["head"].weight = model["embedding"].weight
        return model

    wide = fpe.expand(tied(), generator=seeded())
    fpe.save(wide, tmp_path / "model.safetensors")
    restored = fpe.restore(tied(), tmp_path / "model.safetensors")
    assert restored["head"].weight is restored["embedding"].weight
    for name, value in wide.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value)


def bad(folder: Path) -> list[BadCall]:
    dense, (foreign, broken) = mlp(*SIZES), (folder / "foreign.safetensors", folder / "broken.safetensors")
    save_file(dense.state_dict(), foreign)
    broken.write_bytes(b"nothing")
    meta = RECIPES[0].expand(dense).to("meta")
    return [
        BadCall("dense", lambda: fpe.save(dense, folder / "x"), ValueError, ("save", "no expanded layer")),
        BadCall("meta", lambda: fpe.save(meta, folder / "x"), ValueError, ("save", "'0.edge_weight'", "'meta'")),
        BadCall("no-module", lambda: fpe.save(3, folder / "x"), TypeError, ("save", "int")),  # type: ignore[arg-type]
        BadCall("foreign", lambda: fpe.restore(dense, foreign), ValueError, ("foreign", "fpe.save")),
        BadCall("broken", lambda: fpe.restore(dense, broken), ValueError, ("broken", "no file of safetensors")),
    ]


@pytest.mark.parametrize("which", range(5), ids=["dense", "meta", "no-module", "foreign", "broken"])
def test_what_is_no_such_file_is_refused(which: int, tmp_path: Path) -> None:
    bad(tmp_path)[which].check()
    assert not (tmp_path / "x").exists()


def test_onnx_is_told_to_take_the_dense_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its exporter runs the model: both ways of tracing."""
    wide = fpe.expand(integer_weights(mlp(*SIZES)), generator=seeded()).eval()
    x = torch.randn(2, SIZES[0], dtype=torch.float64, generator=seeded())
    torch.export.export(wide, (x,))
    from torch.onnx._internal.exporter import _flags

    monkeypatch.setattr(_flags, "_is_onnx_exporting", True)
    for strict in (False, True):
        with pytest.raises(Exception, match=r"ONNX.*fpe\.to_dense"):
            torch.export.export(wide, (x,), strict=strict)
        torch._dynamo.reset()
    torch.export.export(fpe.to_dense(wide), (x,))


@each_recipe
def test_the_weight_that_is_made_cannot_be_replaced(recipe: Recipe) -> None:
    layer = recipe.expand(mlp(*SIZES))[0]
    with pytest.raises(TypeError, match=r"Linear: weight is made of edge_weight.*to_dense"):
        layer.weight = nn.Parameter(layer.weight)
