"""What a call costs before anything is computed: counted in calls of functions, so that no clock is needed."""

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from cpu_cases import needs_numba
from every_op import OPS, Case, Maker
from support import ROOT
from torch import nn
from triton.runtime.interpreter import InterpretedFunction

import fpe
from fpe.kernels import Bitmap, BlockLayout, PackedLabels
from fpe.kernels.checks import check_tensor

OURS = tuple(str(ROOT / folder) for folder in ("kernels", "fpe"))
ON_CPU = ("split_matmul", "merge_matmul", "masked_matmul", "kept_split", "kept_merge", "block_matmul", "block_matmul_t")
"""The operations that have a kernel of their own for CPUs."""
SIZES_FROM_LABELS = ("partition_grad", "kept_grad")
"""They know their sizes from labels or a bitmap, which are looked at once more when it is known where they must be."""


def calls(run: Callable[[], object], seen: Callable[[FrameType], None]) -> None:
    """Shows the frame of each call of a function of this package that ``run`` makes, when all is imported and kept."""
    run()

    def watch(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            seen(frame)

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)


def count(run: Callable[[], object]) -> int:
    """How many functions of this package a call of ``run`` calls."""
    frames: list[str] = []
    calls(run, lambda frame: frames.append(frame.f_code.co_name))
    return len(frames)


def call_of(op: str, backend: str) -> Callable[[], object]:
    """A call with a bias where there is one, of one row."""
    dtype = torch.float16 if backend == "triton" else torch.float32
    case = Case(op, backend, dtype, (1,), 32, 32, block=(16, 16), labels="packed", bias=True)
    problem = Maker(case).problem()
    return lambda: problem.ours(*problem.operands)


@pytest.fixture
def without_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers launch nothing."""
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, **options: None)


@pytest.mark.parametrize("op", OPS)
def test_an_argument_is_checked_once(op: str) -> None:
    checked: Counter[tuple[str, str]] = Counter()

    def seen(frame: FrameType) -> None:
        if frame.f_code is check_tensor.__code__:
            checked[frame.f_locals["op"], frame.f_locals["name"]] += 1

    with torch.no_grad():
        calls(call_of(op, "eager"), seen)
    twice = {name for name, times in checked.items() if times > 1}
    assert checked and (not twice or op in SIZES_FROM_LABELS), checked


MOST = {"eager": 85, "cpu": 80, "triton": 110}
"""Functions that a call may call, by backend. Some operations take four fifths of it."""


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_few_functions_stand_before_a_computation(op: str, backend: str, without_launches: None) -> None:
    with torch.no_grad():
        assert count(call_of(op, backend)) <= MOST[backend]


@needs_numba
@pytest.mark.parametrize("op", ON_CPU)
def test_few_functions_stand_before_a_kernel_on_a_cpu(op: str) -> None:
    with torch.no_grad():
        assert count(call_of(op, "cpu")) <= MOST["cpu"]


LABELS, MASK = torch.zeros(8, 16, dtype=torch.uint8), torch.eye(16, dtype=torch.bool)
PARTITION = fpe.Partition(LABELS, 2)
LAYERS: dict[str, Callable[[], Any]] = {
    "split": lambda: fpe.SplitLinear(PARTITION),
    "merge": lambda: fpe.MergeLinear(PARTITION),
    "masked": lambda: fpe.MaskedLinear(MASK),
    "block": lambda: fpe.BlockLinear(MASK, (8, 8)),
}
REPLACED: tuple[tuple[str, str, object], ...] = (
    ("split", "packed", PackedLabels.pack(LABELS[:4], 2)),
    ("merge", "packed", PackedLabels.pack(LABELS, 3)),
    ("masked", "bitmap", Bitmap.pack(~MASK)),
    ("masked", "bitmap", Bitmap.pack(MASK)._replace(bits=torch.zeros(16, 1, dtype=torch.int64))),
    ("masked", "edge_weight", nn.Parameter(torch.ones(15))),
    ("masked", "bias", nn.Parameter(torch.ones(15))),
    ("block", "layout", BlockLayout.from_mask(torch.ones(2, 2, dtype=torch.bool), (16, 16), (8, 8))),
)
"""A layer, and what somebody puts into it that does not fit."""


@pytest.mark.parametrize(("name", "attribute", "value"), REPLACED)
def test_what_is_put_into_a_layer_is_checked_in_its_next_call(name: str, attribute: str, value: object) -> None:
    layer = LAYERS[name]()
    layer.backend = "eager"
    x = torch.ones(1, layer.in_features)
    layer(x)
    setattr(layer, attribute, value)
    with pytest.raises((TypeError, ValueError), match="_matmul: "):
        layer(x)
