"""What ``expand`` refuses: the right error, a message that says expected and got, and the model as it was."""

from typing import Any

import pytest
import torch
from support import (
    SIZES,
    BadCall,
    Transformer,
    mlp,
    snapshot,
)
from torch import nn

import fpe


def changed(change: str) -> nn.Sequential:
    """The usual model with one thing wrong."""
    model = mlp(*SIZES)
    with torch.no_grad():
        if change == "nan":
            model[0].weight[2, 3] = torch.nan
        elif change == "inf":
            model[2].bias[0] = torch.inf
        elif change == "integer":
            model[2].weight = nn.Parameter(model[2].weight.int(), requires_grad=False)
        elif change == "complex":
            model[0].weight = nn.Parameter(model[0].weight.cfloat())
        elif change == "chain":
            model[2] = nn.Linear(SIZES[1] + 1, SIZES[2])
        elif change == "tied":
            model = mlp(8, 8, 8, 8)
            model[2].weight = model[4].weight
        elif change == "reused":
            layer = nn.Linear(8, 8)
            model = nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 8), layer)
        elif change == "reused-norm":
            norm = nn.LayerNorm(8)
            model = nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), norm)
    return model


def bad(case: str, error: type[Exception], *says: str, model: Any = None, **options: Any) -> Any:
    """A bad call of ``expand``, as a pytest parameter: the model, the options, and what must come."""
    return pytest.param(mlp(*SIZES) if model is None else model, options, error, says, id=case)


DEEP = (12, 12, 12, 12, 5)
EXPANDED = fpe.expand(mlp(*SIZES), resparsify="magnitude")
BAD_INPUT = (
    bad("no-module", TypeError, "nn.Module", "int", model=3),
    *(bad(f"alpha-{a}", ValueError, "alpha", repr(a), alpha=a) for a in (1, 0, -1, 2.0, "2", True, None, 255)),
    bad("alpha-2:4-float", ValueError, "alpha", "2.0", alpha=2.0, structure="2:4"),
    bad("alpha-more-than-inputs", ValueError, "at least 25 inputs", "got 24", alpha=25),
    bad("split", ValueError, "random", "'halves'", split="halves"),
    bad("structure", ValueError, "2:4", "'4:8'", structure="4:8"),
    bad("policy", ValueError, "magnitude", "'none'", resparsify="none"),
    bad("2:4-alpha", ValueError, "2:4", "alpha = 3", structure="2:4", alpha=3),
    bad("2:4-inputs", ValueError, "multiple of 4", "got 10", structure="2:4", model=mlp(10, 8, 3)),
    bad("2:4-second-pair", ValueError, "expand: 4 -> 6: ", "got 10", structure="2:4", model=mlp(24, 10, 10, 8, 3)),
    bad("2:4-split", ValueError, "'2:4'", "'gram'", structure="2:4", split="gram"),
    bad("block-missing", ValueError, "block", "None", structure="block"),
    bad("block-policy-missing", ValueError, "block", "None", resparsify="block"),
    bad("block-stray", ValueError, "block=(2, 2)", "'random'", block=(2, 2)),
    *(
        bad(f"block-{b}", ValueError, "positive", repr(b), structure="block", block=b)
        for b in ((0, 4), (4,), 4, (4, 2.0))
    ),
    bad("block-wide", ValueError, "at least 2 tiles", "got 1", structure="block", block=(4, 24)),
    bad("groups-missing", ValueError, "groups", "None", split="groups"),
    bad("groups-stray", ValueError, "groups", "'random'", groups=[0] * 24),
    bad("groups-length", ValueError, "24", "got 3", split="groups", groups=[0, 1, 2]),
    bad("groups-float", TypeError, "integers", "float32", split="groups", groups=[0.5] * 24),
    bad("groups-few", ValueError, "at least 2 groups", "got 1", split="groups", groups=[7] * 24),
    bad("groups-which", ValueError, "mapping", "'0', '4'", split="groups", groups=[0, 1] * 6, model=mlp(*DEEP)),
    bad("groups-names", ValueError, "'0'", "'fc1'", split="groups", groups={"fc1": [0, 1] * 12}),
    bad("excess", ValueError, "0 -> 2", "48", "32", "'partition'", resparsify="input", model=mlp(4, 8, 6)),
    bad("nan", ValueError, "'0'", "finite", "NaN", model=changed("nan")),
    bad("inf", ValueError, "'2'", "finite", "infinity", model=changed("inf")),
    bad("integer-weight", TypeError, "'2'", "floating", "int32", model=changed("integer")),
    bad("complex-weight", TypeError, "'0'", "floating", "complex64", model=changed("complex")),
    bad("chain", ValueError, "'2'", "13", "14", model=changed("chain")),
    bad("tied-weights", ValueError, "'2'", "shared", model=changed("tied")),
    bad("layer-used-twice", ValueError, "'0'", "shared", model=changed("reused")),
    bad("norm-used-twice", ValueError, "'1'", model=changed("reused-norm")),
    bad("one-layer", ValueError, "two dense layers", "got 1", model=nn.Sequential(nn.Linear(4, 2))),
    bad("no-sequential", ValueError, "Transformer", "pairs=", model=Transformer()),
    bad("softmax-between", ValueError, "'1'", "Softmax", "element-wise", model=mlp(8, 8, 8, between=[nn.Softmax(-1)])),
    bad("norm-of-images", ValueError, "LayerNorm", "one dimension", model=mlp(8, 8, 8, between=[nn.LayerNorm((2, 8))])),
    bad("expanded", ValueError, "'0'", "already", "SplitLinear", model=fpe.expand(mlp(*SIZES))),
    bad("expanded-pair", ValueError, "'2'", "already", model=EXPANDED, pairs=[("2", "0")]),
    bad("head", ValueError, "'2'", "head", pairs=[("2", "0")]),
    bad(
        "head-nested",
        ValueError,
        "'1.0'",
        "head",
        pairs=[("1.0", "0")],
        model=nn.Sequential(nn.Linear(4, 4), mlp(4, 4)),
    ),
    bad("pair-unknown", ValueError, "'fc9'", pairs=[("0", "fc9")]),
    bad("pair-no-linear", TypeError, "'1'", "nn.Linear", "ReLU", pairs=[("0", "1")]),
    bad("pair-apart", ValueError, "'0'", "'4'", pairs=[("0", "4")], model=mlp(*DEEP)),
    bad("pair-backwards", ValueError, "'2'", "'0'", pairs=[("2", "0")], model=mlp(*DEEP)),
    bad("pairs-overlap", ValueError, "'2'", "twice", pairs=[("0", "2"), ("2", "4")], model=mlp(*DEEP)),
    bad("pairs-empty", ValueError, "pairs", "empty", pairs=[]),
    bad("pair-string", ValueError, "two layer names", "'02'", pairs=["02"]),
    bad("pair-triple", ValueError, "two layer names", "('0', '2', '4')", pairs=[("0", "2", "4")]),
    bad("pair-int", ValueError, "two layer names", "5", pairs=[5]),
    bad("pair-number", ValueError, "two layer names", "(0, 2)", pairs=[(0, 2)]),
)


@pytest.mark.parametrize(("model", "options", "error", "says"), BAD_INPUT)
def test_bad_input_is_refused(model: Any, options: dict, error: type[Exception], says: tuple[str, ...]) -> None:
    before = snapshot(model) if isinstance(model, nn.Module) else None
    BadCall("", lambda: fpe.expand(model, **options), error, says).check()
    if before is not None:
        after = snapshot(model)
        assert list(after) == list(before)
        assert all(torch.equal(after[k], v) or v.isnan().any() for k, v in before.items())


@pytest.mark.parametrize(
    ("partition", "says"),
    [
        (fpe.Partition.random(13, 23, 2), ("[13, 23]", "[13, 24]")),
        (fpe.Partition(torch.full((13, 24), 7, dtype=torch.uint8), 2), ("7", "0 .. 1")),
        (fpe.Partition.random(13, 24, 2).without(torch.eye(13, 24) > 0), ("partition", "13")),  # would lose 13 weights
    ],
    ids=["shape", "labels", "holes"],
)
def test_expand_pair_refuses_a_partition_that_does_not_fit(partition: fpe.Partition, says: tuple[str, ...]) -> None:
    fc1, _, fc2 = mlp(*SIZES)
    BadCall("", lambda: fpe.expand_pair(fc1, fc2, partition), ValueError, says).check()


def test_expand_pair_refuses_another_policy_or_layers() -> None:
    fc1, relu, fc2 = mlp(*SIZES)
    partition = fpe.Partition.random(13, 24, 2)
    BadCall("", lambda: fpe.expand_pair(fc1, fc2, partition, "none"), ValueError, ("magnitude", "'none'")).check()
    BadCall("", lambda: fpe.expand_pair(fc1, fc2, partition, "block"), ValueError, ("block", "None")).check()
    BadCall("", lambda: fpe.expand_pair(fc2, fc1, partition), ValueError, ("6", "24")).check()
    BadCall("", lambda: fpe.expand_pair(fc1, relu, partition), TypeError, ("nn.Linear", "ReLU")).check()
