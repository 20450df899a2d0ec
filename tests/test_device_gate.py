"""The gate of ``fpe gpu``: it sees what is wrong, and what the checks are."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fpe.bench.families.check import Cast, Check
from fpe.bench.gpu import gate, lost
from fpe.bench.gpu.checks import checks
from fpe.bench.gpu.lost import LostError
from fpe.kernels import UnsupportedError


def check(change: Callable[[Tensor], Tensor], wanted: str = "triton", **options: Any) -> Check:
    """A check of a small product whose implementation is changed where a backend insists."""

    def run(cast: Cast, backend: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        a, b = (cast(torch.randn(16, 16, generator=generator, dtype=torch.float64)) for _ in range(2))
        return [change(a @ b) if backend == wanted else a @ b]

    return Check("product", "test", "product", run, **options)


def nudged(y: Tensor, by: float) -> Tensor:
    return y + by * y.abs().max()


def nan(y: Tensor) -> Tensor:
    y = y.clone()
    y[3, 4] = float("nan")
    return y


def refuse(y: Tensor) -> Tensor:
    raise UnsupportedError("it needs a GPU\nand luck")


def complain(y: Tensor) -> Tensor:
    raise ValueError("expected a matrix, got three")


def crash(y: Tensor) -> Tensor:
    raise RuntimeError("out of resource")


def lose(y: Tensor) -> Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        (lambda y: y, "ok", ""),
        (lambda y: nudged(y, 0.01), "wrong", "times the error allowed"),
        (nan, "wrong", "inf"),
        (lambda y: y[:-1], "wrong", "inf"),
        (lambda y: y + 1e-6 * torch.rand_like(y), "wrong", "other bits"),
        (lambda y: torch.empty_like(y), "wrong", "inf"),  # memory that nobody wrote
        (refuse, "absent", "it needs a GPU"),
        (complain, "error", "expected a matrix"),
        (crash, "error", "out of resource"),
    ],
    ids=["right", "off", "nan", "shape", "random", "unwritten", "refused", "complaint", "crash"],
)
def test_the_gate_judges(change: Callable, status: str, reason: str) -> None:
    row = gate.compare(check(change), "fp32", "triton")
    assert row["status"] == status and reason in row.get("reason", "")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("words", ["CUDA error: illegal memory access", "Triton Error [CUDA]: illegal memory access"])
def test_a_lost_device_is_no_result(words: str) -> None:
    def lose(y: Tensor) -> Tensor:
        raise RuntimeError(words)

    with pytest.raises(LostError, match="illegal memory access"):
        gate.compare(check(lose), "fp32", "triton")


def test_a_device_that_still_answers_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that the driver refuses speaks as one that broke everything."""
    monkeypatch.setattr(lost, "_answers", lambda: True)
    row = gate.compare(check(lose), "fp32", "triton")
    assert row["status"] == "error" and "CUDA error" in row["reason"]


def test_a_network_may_err_twice_as_much_as_its_yardstick() -> None:
    for change, status in ((lambda y: y, "ok"), (lambda y: nudged(y, 0.05), "wrong")):
        assert gate.compare(check(change, by_yardstick=True), "bf16", "triton")["status"] == status


def test_real_checks_are_green_under_the_interpreter_and_red_where_a_kernel_is_broken() -> None:
    found = {c.name: c for c in checks(few=True)}
    blocks = [c for c in found.values() if c.op.startswith("block")]
    assert {c.family for c in found.values()} == {"bitmap", "partition", "block", "semi_structured", "mlp"}
    assert [gate.compare(c, "fp32", "triton")["status"] for c in blocks] == ["ok", "ok"]
    from fpe.kernels.block import triton as module

    real = module.block_matmul_triton
    with patch.dict(module.OPERATIONS, block_matmul=lambda *a, **k: 1.001 * real(*a, **k)):
        broken = gate.compare(blocks[0], "fp32", "triton")
    assert broken["status"] == "wrong" and broken["error"] > 1


def test_every_check_runs_in_every_dtype_on_the_eager_twin() -> None:
    rows = [gate.compare(c, d, "eager") for c in checks(few=True) for d in ("bf16", "fp16", "fp32", "tf32")]
    assert {row["status"] for row in rows} == {"ok"}


def test_packed_labels_and_plain_ones_are_checked() -> None:
    found = {check.name: check for check in checks() if check.family == "partition" and check.op}
    packed = [name for name in found if name.endswith("packed")]
    assert len(packed) * 2 == len(found) and {name.removesuffix(" packed") for name in packed} < {*found}
    for op in ("split_matmul", "merge_matmul", "partition_grad"):
        assert gate.compare(found[f"{op} 17x70x90 alpha 3 strided packed"], "bf16", "triton")["status"] == "ok"


@pytest.mark.parametrize(
    "name",
    [
        "bitmap 17x70x90 density 0.5",
        "expanded_mlp 33x70-13-33 alpha 2 merged",
        "semi_structured_matmul_t 17x70x88, 2 children",
    ],
)
def test_the_other_families_pass_under_the_interpreter(name: str) -> None:
    (check,) = (check for check in checks() if check.name == name)
    assert gate.compare(check, "bf16", "triton")["status"] == "ok"
