"""The choice of an implementation: by what can run, and by the cost model where two can."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from support import seeded
from torch import Tensor

from fpe.kernels import PackedLabels, dispatch, ops, split_matmul
from fpe.kernels.dispatch import IMPLEMENTATIONS, choose_backend, fastest, roof_for
from fpe.kernels.model import PUBLISHED, candidates

SHAPES = [(m, n, k) for m in (1, 16, 64, 256, 2048, 16384) for n, k in ((14336, 4096), (4096, 4096), (64, 512))]


@pytest.mark.parametrize("gpu", ["a100", "4090", "h200", "b200"])
@pytest.mark.parametrize("op", ["split_matmul", "merge_matmul", "partition_grad"])
@pytest.mark.parametrize("alpha", [2, 8])
def test_the_fastest_candidate_is_taken(gpu: str, op: str, alpha: int) -> None:
    for m, n, k in SHAPES:
        seconds = {c.name: c.seconds for c in candidates(op, "random", m, n, k, alpha, "bf16", PUBLISHED[gpu])}
        taken = fastest(op, m, n, k, alpha, "bf16", PUBLISHED[gpu])
        able = {backend: seconds[name] for name, backend in IMPLEMENTATIONS.items()}
        assert able[taken] == min(able.values())


def test_one_token_reads_packed_labels_and_a_large_batch_of_many_children_does_not() -> None:
    assert fastest("split_matmul", 1, 14336, 4096, 2, "bf16", PUBLISHED["h200"]) == "triton"
    assert fastest("split_matmul", 16384, 14336, 4096, 8, "bf16", PUBLISHED["h200"]) == "eager"
    assert fastest("split_matmul", 0, 14336, 4096, 2, "bf16", PUBLISHED["h200"]) == "eager"


def test_a_roof_is_found_for_every_gpu(tmp_path: Path) -> None:
    assert roof_for("NVIDIA H200", 90) is PUBLISHED["h200"]
    unknown = roof_for("NVIDIA Something New", 90)
    assert unknown.arch == 90 and unknown.bandwidth == min(r.bandwidth for r in PUBLISHED.values() if r.arch == 90)
    assert roof_for("NVIDIA Something Newer", 999) in PUBLISHED.values()
    (tmp_path / "configs").mkdir()
    measured = {"name": "Mine", "arch": 90, "bandwidth": 1e12, "flops": {"bf16": 1e14}, "l2": 1e6, "integer": 1e13}
    (tmp_path / "configs/roof_mine_1.json").write_text(json.dumps(measured))
    with patch.object(dispatch, "files", lambda package: tmp_path):
        assert roof_for("Mine 1", 90).source == "measured"


class OnCuda:
    """A tensor that says it is on a GPU."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)


def test_auto_stays_open_only_where_both_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    operand: Tensor = OnCuda()  # type: ignore[assignment]
    monkeypatch.setattr(dispatch, "arch_of", lambda device: 90)
    assert choose_backend("op", "auto", operand, by_cost=True) == "auto"
    assert choose_backend("op", "auto", operand) == "triton"
    assert choose_backend("op", "auto", operand, "too many children", by_cost=True) == "eager"
    assert choose_backend("op", "triton", operand, by_cost=True) == "triton"
    assert choose_backend("op", "auto", torch.ones(1), by_cost=True) == "eager"


@pytest.mark.parametrize("chosen", ["triton", "eager"])
def test_an_open_choice_is_made_when_the_operation_runs(chosen: str) -> None:
    asked = []

    def prefer(*sizes: object) -> str:
        asked.append(sizes[:5])
        return chosen

    labels = PackedLabels.pack(torch.randint(2, (6, 20), generator=seeded(), dtype=torch.uint8), 2)
    x, w = torch.randn(3, 20, generator=seeded(1)), torch.randn(6, 20, generator=seeded(2)).requires_grad_()
    with patch.object(dispatch, "fastest_here", prefer):
        y = ops.split_matmul(x, w, labels.planes, None, None, 2, False, "auto")
        y.sum().backward()
    assert asked == [("split_matmul", 3, 6, 20, 2), ("partition_grad", 3, 6, 20, 2)]
    torch.testing.assert_close(y, split_matmul(x, w, labels, 2, backend="eager"))
