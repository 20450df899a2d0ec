"""Which layers of a model are found, and those that are not pairs: gated triples, fused and transposed layers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import (
    POLICIES,
    BadCall,
    Transformer,
    assert_unchanged,
    expanded_layers,
    integer_weights,
    mlp,
    readable_id,
    seeded,
    snapshot,
)
from torch import Tensor, nn
from torch.nn import functional as F

import fpe
from fpe.groups import Group
from fpe.layers import StackedLinear

# Gated blocks


class Gated(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 10, bias), nn.Linear(12, 10, bias), nn.Linear(10, 6, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Fused(nn.Module):
    """The same with both first layers in one."""

    def __init__(self, gated: Gated) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(12, 20, gated.gate.bias is not None), gated.down
        for what in ("weight", "bias") if gated.gate.bias is not None else ("weight",):
            getattr(self.both, what).data = torch.cat([getattr(gated.gate, what), getattr(gated.up, what)]).detach()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


TRIPLE = [(("gate", "up"), "down")]
FUSED = [(("both", "both"), "down")]
GATED_OPTIONS = [
    *({"resparsify": policy} for policy in POLICIES if policy != "block"),
    {"resparsify": "block", "block": (2, 3)},
    {"structure": "block", "block": (2, 3), "resparsify": "partition"},
    {"structure": "2:4", "resparsify": "input"},
    {"resparsify": "partition", "alpha": 3},
    {"split": "groups", "groups": [i // 3 for i in range(12)], "resparsify": "partition"},
]


@pytest.mark.parametrize("options", GATED_OPTIONS, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_gated_blocks(options: dict, fused: bool) -> None:
    torch.manual_seed(0)
    dense: nn.Module = Fused(Gated()) if fused else Gated()
    before = snapshot(dense)
    x = torch.randn(3, 12, generator=seeded())
    pairs = FUSED if fused else TRIPLE
    wide = fpe.expand(dense, pairs=pairs, generator=seeded(), example_inputs=x, **options)
    assert_unchanged(dense, before)
    assert fpe.nonzeros(wide) == fpe.nonzeros(dense) == 2 * 12 * 10 + 10 * 6
    plain = fpe.to_dense(wide)
    assert {type(m) for m in plain.children()} == {nn.Linear}
    torch.testing.assert_close(wide(x), plain(x))
    restored = fpe.restore(dense, wide.state_dict())
    assert torch.equal(restored(x), wide(x))
    for model in (wide, plain):
        model(x).square().sum().backward()
    gate, up = wide.both if fused else (wide.gate, wide.up)
    wanted = plain.both.weight.grad.chunk(2) if fused else (plain.gate.weight.grad, plain.up.weight.grad)
    for layer, gradient in zip((gate, up), wanted, strict=True):
        got = torch.autograd.grad((layer.weight * gradient).sum(), layer.edge_weight)[0]
        torch.testing.assert_close(layer.edge_weight.grad, got)  # the dense twin's, at the edges


def test_both_sides_of_a_gate_share_one_partition() -> None:
    wide = fpe.expand(Gated(), pairs=TRIPLE, resparsify="partition", generator=seeded())
    assert torch.equal(wide.gate.labels, wide.up.labels)
    assert torch.equal(wide.gate.kept().unflatten(0, (2, 10)).sum(0), torch.ones(10, 12))


def test_a_child_of_the_gate_meets_its_own_child() -> None:
    """Child by child: with integers every product is exact, and each is computed here from its child's inputs."""
    dense = integer_weights(Gated(bias=False))
    dense.forward = None  # type: ignore[assignment]
    del dense.forward
    wide = fpe.expand(dense, pairs=TRIPLE, resparsify="partition", generator=seeded())
    x = torch.randint(-3, 4, (5, 12), generator=seeded()).double()
    labels, owner = wide.gate.labels, wide.down.labels
    total = torch.zeros(5, 6, dtype=torch.float64)
    for child in range(2):
        gate, up = (x @ torch.where(labels == child, own.weight, 0).T for own in (dense.gate, dense.up))
        total += (F.silu(gate) * up) @ torch.where(owner == child, dense.down.weight, 0).T
    torch.testing.assert_close(wide(x), total)


def test_a_fused_layer_is_its_parts() -> None:
    torch.manual_seed(0)
    apart = Gated()
    fused = Fused(apart)
    one = fpe.expand(apart, pairs=TRIPLE, generator=seeded())
    other = fpe.expand(fused, pairs=FUSED, generator=seeded())
    x = torch.randn(3, 12, generator=seeded())
    assert isinstance(other.both, StackedLinear)
    assert torch.equal(one(x), other(x))
    assert torch.equal(other.both.weight, torch.cat([one.gate.weight, one.up.weight]))
    assert (other.both.in_features, other.both.out_features) == (12, 40)
    assert torch.equal(other.both.bias, torch.cat([one.gate.bias, one.up.bias]))


# Transposed layers, as GPT-2's


class Conv1D(nn.Module):
    """As transformers has it: the weight is ``[inputs, outputs]``."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Transposed(nn.Module):
    def __init__(self, inputs: int = 12) -> None:
        super().__init__()
        self.fc, self.proj = Conv1D(10, inputs), Conv1D(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x)))


@pytest.mark.parametrize("policy", ["magnitude", "input", "partition"])
def test_transposed_layers(policy: str) -> None:
    torch.manual_seed(0)
    dense = Transposed(24)
    x = torch.randn(3, 24, generator=seeded())
    options = {"pairs": [("fc", "proj")], "resparsify": policy, "generator": seeded(), "example_inputs": x}
    wide = fpe.expand(dense, **options)
    assert fpe.nonzeros(wide) == fpe.nonzeros(dense)
    assert torch.equal(wide.fc.weight.sum(0), torch.where(wide.fc.kept(), dense.fc.weight.T.repeat(2, 1), 0).sum(0))
    torch.testing.assert_close(wide(x), fpe.to_dense(wide)(x))
    assert torch.equal(fpe.restore(dense, wide.state_dict())(x), wide(x))
    assert fpe.find_pairs(dense, example_inputs=x).groups == (Group(("fc",), "proj"),)


# Names and patterns


def names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, fpe.layers.ExpandedLinear)]


@pytest.mark.parametrize(
    "pairs",
    [
        [("blocks.*.fc1", "blocks.*.fc2")],
        [("*.fc1", "*.fc2")],
        [(re.compile(r"blocks\.(\d+)\.fc1"), r"blocks.\1.fc2")],
        [(re.compile(r"(?P<block>.*)\.fc1"), r"\g<block>.fc2")],
    ],
    ids=str,
)
def test_pairs_are_named_by_patterns(pairs: list) -> None:
    wide = fpe.expand(Transformer(), pairs=pairs, generator=seeded())
    assert names(wide) == [f"blocks.{i}.{layer}" for i in range(2) for layer in ("fc1", "fc2")]
    assert_unchanged(
        wide,
        snapshot(
            fpe.expand(
                Transformer(),
                pairs=[("blocks.0.fc1", "blocks.0.fc2"), *pairs[1:], ("blocks.1.fc1", "blocks.1.fc2")],
                generator=seeded(),
            )
        ),
    )


def test_a_pattern_means_gated_layers_too() -> None:
    model = nn.ModuleDict({"a": Gated(), "b": Gated()})
    found = fpe.find_pairs(model, [(("*.gate", "*.up"), "*.down")])
    assert found.groups == tuple(Group((f"{n}.gate", f"{n}.up"), f"{n}.down") for n in "ab")


BAD_PAIRS = [
    BadCall("no-match", lambda: fpe.expand(Transformer(), pairs=[("*.fc3", "*.fc2")]), ValueError, ("*.fc3",)),
    BadCall("stars", lambda: fpe.expand(Transformer(), pairs=[("*.fc1", "fc2")]), ValueError, ("as many '*'",)),
    BadCall("no-second", lambda: fpe.expand(Transformer(), pairs=[("*.fc1", "*.up")]), ValueError, ("'blocks.0.up'",)),
    BadCall(
        "gate-sizes",
        lambda: fpe.expand(
            nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(5, 6), "c": nn.Linear(6, 2)}),
            pairs=[(("a", "b"), "c")],
        ),
        ValueError,
        ("'b'", "4 inputs", "got 5"),
    ),
    BadCall("fused-sizes", lambda: fpe.expand(Gated(), pairs=[(("gate", "gate"), "down")]), ValueError, ("5 outputs",)),
    BadCall("nothing", lambda: fpe.expand(Gated()), ValueError, ("'gate'", "example_inputs", "pairs=")),
    BadCall("no-module", lambda: fpe.find_pairs(3), TypeError, ("find_pairs", "int")),
]


@pytest.mark.parametrize("case", BAD_PAIRS, ids=readable_id)
def test_pairs_that_are_none_are_refused(case: BadCall) -> None:
    case.check()


# Known blocks and chains


def test_transformer_layers_of_pytorch_are_known() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)).eval()
    wide = fpe.expand(model, generator=seeded())
    assert names(wide) == [f"0.layers.{i}.{name}" for i in range(2) for name in ("linear1", "linear2")]
    assert fpe.nonzeros(wide) == fpe.nonzeros(model)
    x = torch.randn(2, 5, 16, generator=seeded())
    with torch.no_grad():
        torch.testing.assert_close(wide(x), fpe.to_dense(wide)(x))
        assert torch.equal(fpe.restore(model, wide.state_dict()).eval()(x), wide(x))
    decoder = nn.TransformerDecoderLayer(16, 2, 32)
    assert fpe.find_pairs(decoder).groups == (Group(("linear1",), "linear2"),)


def test_a_known_block_with_another_forward_is_unknown() -> None:
    class Other(nn.TransformerEncoderLayer):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return x

    assert not fpe.find_pairs(Other(16, 2, 32)).groups
    patched = nn.TransformerEncoderLayer(16, 2, 32)
    patched.forward = lambda x: x  # type: ignore[assignment, method-assign]
    assert not fpe.find_pairs(patched).groups


def test_chains_inside_a_model_are_paired_and_their_norms_widened() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"head": mlp(12, 8, 6, 4, between=[nn.LayerNorm(8)]), "other": nn.Linear(4, 4)})
    found = fpe.find_pairs(model)
    assert found.groups == (Group(("head.0",), "head.3"),)
    assert "last layer" in found.refused["head.5"] and "no block" in found.refused["other"]
    wide = fpe.expand(model, generator=seeded())
    x = torch.randn(3, 12, generator=seeded())
    torch.testing.assert_close(wide["head"](x), fpe.to_dense(wide)["head"](x))
    assert torch.equal(fpe.restore(model, wide.state_dict())["head"](x), wide["head"](x))
    again = fpe.find_pairs(wide)
    assert not again.groups and "expanded already" in again.refused["head.0"]


def test_what_cannot_stand_between_is_named() -> None:
    model = nn.ModuleDict({"head": mlp(8, 8, 8, between=[nn.Softmax(-1)])})
    assert "Softmax" in fpe.find_pairs(model).refused["head.0"]


def test_a_shared_weight_counts_once() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "head": nn.Linear(4, 7)})
    model["head"].weight = model["embedding"].weight
    assert fpe.nonzeros(model) == 28


def test_what_was_found_reads_well() -> None:
    model = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3)])
    model.append(nn.Linear(8, 2))
    lines = str(fpe.find_pairs(model)).splitlines()
    assert lines[0] == "expands *.linear1 -> *.linear2  (3 times)"
    assert len(lines) == 3 and lines[-1].startswith("leaves  3: is in no block")


# Unknown models: one forward pass


class Unknown(nn.Module):
    """Two layers and what is between them, given as a function."""

    def __init__(self, between: object, extra: int = 0, outputs: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, outputs), nn.Linear(10, 5), nn.Linear(8, 10)
        self.scale = nn.Parameter(torch.rand(10))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x)  # type: ignore[operator]


JOINED = {
    "gelu": lambda m, x: m.b(F.gelu(m.a(x))),
    "swish": lambda m, x: m.b((h := m.a(x)) * torch.sigmoid(1.7 * h) + 1),
    "reshaped": lambda m, x: m.b(m.a(x).flatten(0, 1).relu()).unflatten(0, x.shape[:2]),
    "rows-scaled": lambda m, x: m.b(m.a(x) * x.sum(-1, keepdim=True)),
    "in-place": lambda m, x: m.b(F.relu_(m.a(x))),
    "dropout": lambda m, x: m.b(F.dropout(m.a(x).tanh(), 0.5, m.training)),
}
APART = {
    "softmax": (lambda m, x: m.b(m.a(x).softmax(-1)), "softmax"),
    "scale": (lambda m, x: m.b(m.a(x) * m.scale), "mul"),
    "residual": (lambda m, x: m.b(m.a(x) + F.pad(x, (0, 2))), "add"),
    "returned": (lambda m, x: (m.b(h := m.a(x).relu()), h)[1], "the model's"),
    "norm": (lambda m, x: m.b(F.layer_norm(m.a(x), (10,))), "layer_norm"),
    "counted": (lambda m, x: m.b(m.a(x).reshape(-1, 10).relu()), "fails"),
    "flipped": (lambda m, x: m.b(m.a(x).flip(-1)), "flip"),
    "also-summed": (lambda m, x: m.b(h := m.a(x).relu()) + h.sum(), "sum"),
    "unread": (lambda m, x: (m.a(x), m.b(F.pad(x, (0, 2))))[1], "no other linear layer"),
}


@pytest.mark.parametrize("name", JOINED)
def test_a_forward_finds_layers_joined_by_element_wise_code(name: str) -> None:
    model, x = Unknown(JOINED[name]), torch.randn(2, 3, 8, generator=seeded())
    found = fpe.find_pairs(model, example_inputs=x)
    assert found.groups == (Group(("a",), "b"),)
    assert found.refused == {"c": "it does not run on example_inputs"}
    wide = fpe.expand(model, example_inputs=x, generator=seeded()).eval()
    torch.testing.assert_close(wide(x), fpe.to_dense(wide)(x))


@pytest.mark.parametrize("name", APART)
def test_a_forward_finds_why_layers_are_no_pair(name: str) -> None:
    between, why = APART[name]
    found = fpe.find_pairs(Unknown(between), example_inputs=torch.randn(2, 3, 8, generator=seeded()))
    assert not found.groups
    assert why in found.refused["a"]


def test_a_forward_finds_gates() -> None:
    x = torch.randn(3, 12, generator=seeded())
    assert fpe.find_pairs(Gated(), example_inputs=x).pairs == TRIPLE
    assert fpe.find_pairs(Fused(Gated()), example_inputs=(x,)).pairs == FUSED
    assert fpe.find_pairs(Fused(Gated()), example_inputs={"x": x}).pairs == FUSED


def test_of_a_row_of_layers_a_forward_pairs_every_other() -> None:
    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return x

    found = fpe.find_pairs(Row(), example_inputs=torch.randn(2, 6, generator=seeded()))
    assert found.pairs == [("layers.0", "layers.1"), ("layers.2", "layers.3")]


# transformers, of which a few lines stand in here: the quantizer is entered whichever package comes first

FAKE = {
    "__init__": "class PreTrainedModel: pass\n",
    "quantizers/__init__": "",
    "quantizers/auto": "ENTERED = []\n"
    "def register_quantizer(name):\n    return lambda cls: ENTERED.append(name) or cls\n"
    "register_quantization_config = register_quantizer\n",
    "quantizers/base": "class HfQuantizer: pass\n",
    "utils/__init__": "",
    "utils/quantization_config": "class QuantizationConfigMixin:\n    def __init__(self, quant_method): pass\n",
}


@pytest.mark.parametrize("first", ["fpe", "transformers.quantizers.auto"])
def test_the_quantizer_is_entered_whichever_comes_first(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in FAKE.items():
        path = tmp_path / f"transformers/{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = f"import sys, {first}, fpe\n"
    code += "assert ('transformers' in sys.modules) == ('transformers' in sys.argv[1])\n"
    code += "import transformers.quantizers.auto as auto\nprint(auto.ENTERED)"
    done = subprocess.run(
        [sys.executable, "-c", code, first], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "['fpe', 'fpe']", done.stderr


def test_expanded_layers_of_a_partly_expanded_model_stay() -> None:
    dense = Transformer()
    once = fpe.expand(dense, pairs=[("blocks.0.fc1", "blocks.0.fc2")], generator=seeded())
    found = fpe.find_pairs(once, example_inputs=torch.randn(2, 12, generator=seeded()))
    assert found.groups == (Group(("blocks.1.fc1",), "blocks.1.fc2"),)
    assert len(expanded_layers(fpe.expand(once, pairs=found.pairs))) == 4
