"""Architectures that people have: found, expanded, trained, generated with, saved, loaded; docs/models.md's table."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from torch import Tensor, nn
from transformers import PreTrainedModel

import fpe
from fpe.layers import ExpandedLinear
from fpe.probe import run

TABLE = Path(__file__).resolve().parents[2] / "docs/models.md"
BEGIN, END = "<!-- table: architectures -->", "<!-- end -->"
ROWS: dict[str, str] = {}
EXPANDED = [a for a in ARCHITECTURES if a.pairs]


def named(architecture: Architecture) -> str:
    return architecture.id


def built(architecture: Architecture) -> nn.Module:
    torch.manual_seed(0)
    model = architecture.make().eval()
    for p in model.parameters():  # some are made with weights of zero, through which nothing would be seen
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    return model


def expanded(architecture: Architecture) -> tuple[nn.Module, nn.Module]:
    dense = built(architecture)
    return dense, fpe.expand(dense, alpha=2, generator=torch.Generator().manual_seed(0))


def assert_same(ours: list[Tensor], theirs: list[Tensor], exactly: bool = False) -> None:
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        if exactly:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", EXPANDED, ids=named)
def test_an_architecture(architecture: Architecture, tmp_path: Path) -> None:
    dense, wide = expanded(architecture)
    found = fpe.find_pairs(dense)
    assert len(found.groups) == architecture.pairs
    assert fpe.nonzeros(wide) == fpe.nonzeros(dense)
    inputs = architecture.inputs()
    twin = fpe.to_dense(wide)
    assert stored(twin, dense) == stored(dense, dense)
    ours = run(wide, inputs)
    assert_same(ours, run(twin, inputs))
    assert not any(isinstance(m, ExpandedLinear) for m in twin.modules())
    trained(wide.train(), inputs)
    wide.eval()
    generated = architecture.generates and generates(wide, fpe.to_dense(wide), inputs)
    restored(dense, wide, inputs, tmp_path)
    first, count = found.groups[0], len(found.groups)
    groups = f"{count} {'gated triples' if len(first.firsts) == 2 else 'pair' + 's' * (count > 1)}"
    if first.parts > 1:
        groups += ", gate and up in one layer"
    ROWS[architecture.id] = (
        f"| {architecture.id} | {groups} | {fpe.nonzeros(dense)} | {fpe.nonzeros(wide)} | yes | yes | "
        f"{'yes' if generated else '-'} | yes |"
    )


def stored(model: nn.Module, dense: nn.Module) -> int:
    """Weights of a plain model that are not zero, in the layers of what is expanded."""
    names = {name for group in fpe.find_pairs(dense).groups for name in group.names}
    return sum(int((model.get_submodule(name).weight != 0).sum()) for name in names)


def trained(wide: nn.Module, inputs: Any) -> None:
    """One step of Adam: every weight of an expanded layer has a gradient, and removed ones stay zero."""
    optimizer = torch.optim.Adam(wide.parameters(), lr=1e-3)
    output = wide(**inputs) if isinstance(inputs, dict) else wide(inputs)
    first = output if isinstance(output, Tensor) else next(t for t in output.to_tuple() if isinstance(t, Tensor))
    first.square().mean().backward()
    optimizer.step()
    layers = [m for m in wide.modules() if isinstance(m, ExpandedLinear)]
    assert layers
    for layer in layers:
        used = layer.edge_weight.grad
        assert used is not None and bool(used.isfinite().all())
        assert torch.equal(layer.weight != 0, layer.kept())
    assert sum(bool(layer.edge_weight.grad.any()) for layer in layers) == len(layers)


def generates(wide: Any, twin: Any, inputs: dict[str, Tensor]) -> bool:
    """Greedy and by beams: the tokens of the dense twin."""
    given = {name: t for name, t in inputs.items() if not name.startswith("decoder")}
    for options in ({}, {"num_beams": 3}):
        tokens = [m.generate(**given, max_new_tokens=5, do_sample=False, **options) for m in (wide, twin)]
        assert torch.equal(*tokens)
    return True


def restored(dense: nn.Module, wide: nn.Module, inputs: Any, folder: Path) -> None:
    """By the package's own file, and by transformers' methods where the model has them."""
    ours = run(wide, inputs)
    fpe.save(wide, folder / "model.safetensors")
    assert_same(run(fpe.restore(dense, folder / "model.safetensors").eval(), inputs), ours, exactly=True)
    if isinstance(wide, PreTrainedModel):
        wide.save_pretrained(folder / "whole")
        again, report = type(wide).from_pretrained(folder / "whole", output_loading_info=True)
        assert not any(report.values())
        assert_same(run(again, inputs), ours, exactly=True)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if not a.pairs], ids=named)
def test_an_architecture_that_is_refused(architecture: Architecture) -> None:
    dense = built(architecture)
    with pytest.raises(ValueError, match=architecture.why_not) as caught:
        fpe.expand(dense)
    said = str(caught.value).partition(": ")[2].partition(": ")[2].partition(";")[0]
    ROWS[architecture.id] = f"| {architecture.id} | none: {said} | {fpe.nonzeros(dense)} | - | - | - | - | - |"


def test_the_documents_table_is_this_one(request: pytest.FixtureRequest) -> None:
    if len(ROWS) < len(ARCHITECTURES):
        pytest.skip("not all architectures were tried")
    header = ["| architecture | expanded | non-zeros before | after | forward | training | generate | save, load |"]
    header.append("| --- | --- | ---: | ---: | --- | --- | --- | --- |")
    drawn = "\n".join([BEGIN, *header, *(ROWS[a.id] for a in ARCHITECTURES), END])
    text = TABLE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.partition(END)[2]
    if request.config.getoption("--write-table"):
        TABLE.write_text(before + drawn + after)
    assert TABLE.read_text() == before + drawn + after, "run with --write-table"
