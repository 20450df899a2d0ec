"""What a replacement would drop is refused by name, and one forward pass finds pairs that are none."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import BadCall, Recipe, assert_unchanged, expanded_layers, mlp, readable_id, seeded, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

import fpe
from fpe import BlockLinear, MaskedLinear, MergeLinear, Partition, SplitLinear
from fpe.convolution import expand_conv_pair


class Clipped(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


class Packed(Tensor):
    """As quantization and sharding hold weights."""


class Renamed(nn.Linear):
    """A subclass that computes what its base does."""


class Shifted(nn.Sequential):
    """A chain with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Clamped(nn.ReLU):
    """An activation whose own forward nobody knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


def spoilt(change: Callable[[nn.Sequential], Any]) -> nn.Sequential:
    model = mlp(8, 8, 8)
    change(model)
    return model


def tie_biases(model: nn.Sequential) -> None:
    model[2].bias = model[0].bias


def own_forward(model: nn.Sequential) -> None:
    model[0].forward = lambda x: x  # as accelerate puts its hooks in


def tie_norm(model: nn.Sequential) -> None:
    model.insert(1, nn.LayerNorm(8))
    model.append(nn.LayerNorm(8))
    model[1].weight = model[4].weight


DROPPED = {
    "forward-hook": (lambda m: m[0].register_forward_hook(lambda *a: None), ("'0'", "_forward_hooks")),
    "pre-hook": (lambda m: m[2].register_forward_pre_hook(lambda *a: None), ("'2'", "_forward_pre_hooks")),
    "backward-hook": (lambda m: m[0].register_full_backward_hook(lambda *a: None), ("'0'", "_backward_hooks")),
    "load-hook": (lambda m: m[0].register_load_state_dict_post_hook(lambda *a: None), ("'0'", "_load_state_dict")),
    "gradient-hook": (lambda m: m[0].weight.register_hook(lambda g: g), ("'0'", "hooks (weight)")),
    "accumulated-hook": (
        lambda m: m[2].bias.register_post_accumulate_grad_hook(lambda p: None),
        ("'2'", "hooks (bias)"),
    ),
    "own-forward": (lambda m: m.insert(0, Clipped(8, 8)), ("'0'", "Clipped", "forward of its own")),
    "patched-forward": (own_forward, ("'0'", "forward of its own")),
    "tied-biases": (tie_biases, ("bias of '0'", "shared (0.bias, 2.bias)")),
    "tied-norm": (tie_norm, ("weight of '1'", "shared (1.weight, 4.weight)")),
    "weight-norm": (lambda m: parametrizations.weight_norm(m[0]), ("'0'", "parametrized (weight)")),
    "spectral-norm": (lambda m: parametrizations.spectral_norm(m[2]), ("'2'", "parametrized (weight)")),
    "old-weight-norm": (lambda m: weight_norm(m[0]), ("'0'", "weight_g", "remove_weight_norm")),
    "old-spectral-norm": (lambda m: nn.utils.spectral_norm(m[0]), ("'0'", "weight_orig", "remove_spectral_norm")),
    "pruned": (lambda m: prune.random_unstructured(m[0], "weight", 0.5), ("'0'", "weight_mask", "prune.remove")),
    "child": (lambda m: m[0].add_module("lora", nn.Linear(2, 2)), ("'0'", "more than a weight", "lora")),
    "buffer": (lambda m: m[0].register_buffer("scale", torch.ones(1)), ("'0'", "scale")),
    "norm-parametrized": (
        lambda m: (m.insert(1, nn.LayerNorm(8)), parametrizations.weight_norm(m[1])),
        ("'1'", "parametrized"),
    ),
    "activation-of-its-own": (lambda m: m.insert(1, Clamped()), ("'1'", "Clamped", "element-wise")),
    "lazy": (lambda m: m.insert(0, nn.LazyLinear(8)), ("'0'", "LazyLinear", "run one forward")),
    "lazy-norm": (lambda m: m.insert(1, nn.LazyBatchNorm1d()), ("'1'", "LazyBatchNorm1d", "run one forward")),
}


@pytest.mark.parametrize(("change", "says"), DROPPED.values(), ids=DROPPED)
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_what_would_be_dropped_is_refused(change: Callable[[nn.Sequential], Any], says: tuple[str, ...]) -> None:
    BadCall("", lambda: fpe.expand(spoilt(change)), ValueError, ("expand", *says)).check()


@pytest.mark.parametrize("spoil", [lambda c: c.register_forward_hook(print), lambda c: parametrizations.weight_norm(c)])
def test_convolutions_are_looked_at_too(spoil: Callable[[nn.Module], Any]) -> None:
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    spoil(second)
    BadCall("", lambda: expand_conv_pair(first, second, Partition.random(4, 4, 2)), ValueError, ("'conv2'",)).check()


def test_a_chain_with_a_forward_of_its_own_is_no_chain() -> None:
    model = Shifted(*mlp(8, 8, 8))
    BadCall("", lambda: fpe.expand(model), ValueError, ("Shifted", "pairs=", "forward of its own")).check()
    nested = nn.Sequential(nn.Linear(8, 8), Shifted(nn.ReLU()), nn.Linear(8, 8))
    BadCall("", lambda: fpe.expand(nested), ValueError, ("'1'", "Shifted")).check()
    wide = fpe.expand(model, pairs=[("0", "2")], generator=seeded())
    x = torch.randn(3, 8, generator=seeded())
    torch.testing.assert_close(wide(x), fpe.to_dense(wide)(x))


def test_subclasses_that_compute_the_same_are_expanded() -> None:
    class Head(nn.Sequential):
        pass

    dense = Head(OrderedDict(first=Renamed(8, 8), act=nn.Sequential(nn.ReLU()), second=nn.Linear(8, 3)))
    wide = fpe.expand(dense, resparsify="partition", generator=seeded())
    assert type(wide) is Head and len(expanded_layers(wide)) == 2
    assert_unchanged(fpe.restore(dense, wide.state_dict()), snapshot(wide))


# Which layers feed which


class Block(nn.Module):
    """Two layers, and what may go wrong between them."""

    def __init__(self, between: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.gate = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.norm, self.between = nn.LayerNorm(12), between

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        if self.between == "backwards":
            return {"y": self.fc1(self.fc2(x).relu())}
        if self.between == "unused":
            return {"y": self.gate(x)}
        h = self.fc1(x)
        if self.between == "residual":
            return {"y": self.fc2(x + h)}
        if self.between == "gated":
            h = h * self.gate(x).sigmoid()
        if self.between == "norm":
            h = self.norm(h)
        if self.between == "softmax":
            h = h.softmax(-1)
        if self.between == "mean":
            h = h + h.mean(-1, keepdim=True) + h.sum(-1, keepdim=True)
        if self.between == "halves":
            h = torch.cat([h.flatten(-1)[..., : h.shape[-1] // 2]] * 2, -1)
        return {"y": self.fc2(nn.functional.dropout(h.relu(), 0.5, self.training)) * scale}


NO_PAIRS = {
    "backwards": "'fc2' runs before 'fc1'",
    "unused": "'fc1' does not run",
    "residual": "fails",
    "gated": "fails",
    "norm": "fails",
    "softmax": "something else",
    "mean": "something else",
    "halves": "something else",
}


@pytest.mark.parametrize(("between", "says"), NO_PAIRS.items(), ids=NO_PAIRS)
def test_pairs_that_are_none_are_found_by_a_forward(between: str, says: str) -> None:
    model = Block(between)
    before = snapshot(model)
    BadCall(
        "",
        lambda: fpe.expand(model, pairs=[("fc1", "fc2")], resparsify="partition", example_inputs=torch.randn(3, 12)),
        ValueError,
        ("expand", "'fc1'", says),
    ).check()
    assert_unchanged(model, before)
    assert model.training and not model.fc1._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=readable_id)
def test_pairs_pass_a_forward(dtype: torch.dtype) -> None:
    model = Block("relu").to(dtype)
    options: dict[str, Any] = {"pairs": [("fc1", "fc2")], "resparsify": "partition"}
    x = torch.randn(3, 12, generator=seeded()).to(dtype)
    plain = fpe.expand(model, generator=seeded(), **options)
    checked = fpe.expand(model, generator=seeded(), example_inputs=(x, 2.0), **options)
    assert_unchanged(checked, snapshot(plain))


def test_the_culprit_among_pairs_is_named() -> None:
    model = nn.ModuleDict({"a": Block("relu"), "b": Block("softmax")})

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["b"](self.parts["a"](x)["y"])["y"]

    pairs = [(f"parts.{name}.fc1", f"parts.{name}.fc2") for name in "ab"]
    BadCall(
        "",
        lambda: fpe.expand(Two(), pairs=pairs, resparsify="partition", example_inputs=torch.randn(2, 12)),
        ValueError,
        ("'parts.b.fc1'", "'parts.b.fc2'"),
    ).check()


def test_norms_that_are_widened_pass() -> None:
    dense = mlp(8, 8, 8, 8, 4, between=[nn.LayerNorm(8), nn.BatchNorm1d(8), nn.PReLU(8)])
    wide = fpe.expand(dense, 3, resparsify="partition", example_inputs=torch.randn(5, 8), generator=seeded())
    assert len(expanded_layers(wide)) == 4


# What is no layer, no mask, no generator


class Linear(nn.Module):
    """Another Linear than PyTorch's."""


PARTITION = Partition.random(4, 8, 2, generator=seeded())
MASK = torch.ones(4, 8, dtype=torch.bool)
OBSCURE = (
    BadCall("generator-int", lambda: fpe.expand(mlp(8, 8, 8), generator=3), TypeError, ("Generator", "int", "seed")),
    BadCall("generator-pair", lambda: Partition.random(4, 8, 2, generator=3), TypeError, ("torch.Generator", "int")),
    BadCall(
        "generator-moves",
        lambda: fpe.Rewiring(SplitLinear(PARTITION), torch.optim.SGD([torch.ones(1)]), generator=3),
        TypeError,
        ("Rewiring", "torch.Generator", "int"),
    ),
    BadCall(
        "another-linear",
        lambda: fpe.expand(nn.Sequential(Linear(), nn.Linear(2, 2)), pairs=[("0", "1")]),
        TypeError,
        ("nn.Linear", f"{Linear.__module__}.Linear"),
    ),
    BadCall(
        "float8",
        lambda: fpe.expand(mlp(8, 8, 8).to(torch.float8_e4m3fn)),
        TypeError,
        ("'0'", "16, 32 or 64 bits", "float8_e4m3fn"),
    ),
    BadCall("mask-list", lambda: MaskedLinear([[True]]), TypeError, ("MaskedLinear: mask", "torch.bool", "list")),
    BadCall("mask-float", lambda: MaskedLinear(torch.ones(2, 2)), TypeError, ("mask", "torch.bool", "float32")),
    BadCall("mask-vector", lambda: MaskedLinear(MASK[0]), ValueError, ("mask", "matrix", "[8]")),
    BadCall("mask-meta", lambda: MaskedLinear(MASK.to("meta")), ValueError, ("mask", "meta")),
    BadCall("kept-list", lambda: BlockLinear([[True]], (1, 1)), TypeError, ("BlockLinear: kept", "list")),
    BadCall("kept-vector", lambda: BlockLinear(MASK[0], (1, 1)), ValueError, ("kept", "matrix", "[8]")),
    BadCall("partition-labels", lambda: SplitLinear(PARTITION.labels), TypeError, ("fpe.Partition", "Tensor")),
    BadCall(
        "partition-meta",
        lambda: MergeLinear(Partition(PARTITION.labels.to("meta"), 2)),
        ValueError,
        ("MergeLinear", "labels", "meta"),
    ),
    BadCall("merge-width", lambda: MergeLinear(PARTITION)(torch.ones(2, 8)), ValueError, ("[..., 16]", "[2, 8]")),
    BadCall("masked-width", lambda: MaskedLinear(MASK)(torch.ones(2, 4)), ValueError, ("[..., 8]", "[2, 4]")),
    BadCall("block-width", lambda: BlockLinear(MASK, (2, 2))(torch.ones(4)), ValueError, ("[..., 8]", "[4]")),
    BadCall("no-input", lambda: SplitLinear(PARTITION)(None), ValueError, ("[..., 8]", "NoneType")),
    BadCall("restore-none", lambda: fpe.restore(None, {}), TypeError, ("restore", "nn.Module", "NoneType")),
    BadCall("restore-no-state", lambda: fpe.restore(mlp(2, 2), None), TypeError, ("restore", "state", "NoneType")),
    BadCall("to-dense-none", lambda: fpe.to_dense(None), TypeError, ("to_dense", "nn.Module", "NoneType")),
    BadCall("nonzeros-none", lambda: fpe.nonzeros(None), TypeError, ("nonzeros", "nn.Module", "NoneType")),
    BadCall(
        "pair-partition",
        lambda: fpe.expand_pair(nn.Linear(8, 4), nn.Linear(4, 2), PARTITION.labels),
        TypeError,
        ("expand_pair", "fpe.Partition", "Tensor"),
    ),
    BadCall(
        "sharded-or-quantized",
        lambda: fpe.expand(
            spoilt(lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(8, 8).as_subclass(Packed))))
        ),
        TypeError,
        ("weight of '0'", "Packed", "sharding or quantizing"),
    ),
)


@pytest.mark.parametrize("case", OBSCURE, ids=readable_id)
def test_messages_name_what_was_expected_and_what_came(case: BadCall) -> None:
    case.check()


def test_a_lazy_layer_is_expanded_once_it_has_sizes() -> None:
    dense = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))
    dense(torch.ones(2, 6))
    assert fpe.nonzeros(Recipe(resparsify="partition").expand(dense)) == 8 * 6 + 8 * 3
