"""The choice of an implementation: by what can run, and by the cost model where two can."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from gluon_numpy import on_numpy
from support import allow, seeded
from torch import Tensor

from fpe.kernels import PackedLabels, device, dispatch, merge_matmul, split_matmul
from fpe.kernels.dispatch import EAGER, UnsupportedError, choose_backend, ranked, roof_for, stays
from fpe.kernels.model import Sizes, candidates
from fpe.kernels.partition import ops
from fpe.kernels.partition.backends import SPLIT
from fpe.kernels.partition.interleaved import as_merge
from fpe.kernels.roofs import PUBLISHED
from fpe.kernels.semi_structured import torch_sparse
from fpe.kernels.semi_structured.backends import BACKENDS

SHAPES = [(m, n, k) for m in (1, 16, 64, 256, 2048, 16384) for n, k in ((14336, 4096), (4096, 4096), (64, 512))]


@pytest.mark.parametrize("gpu", ["a100", "4090", "h200", "b200"])
@pytest.mark.parametrize("op", ["split_matmul", "merge_matmul", "partition_grad"])
@pytest.mark.parametrize("alpha", [2, 8])
def test_the_fastest_candidate_comes_first(gpu: str, op: str, alpha: int) -> None:
    for m, n, k in SHAPES:
        found = candidates(op, Sizes(m, n, k, alpha), PUBLISHED[gpu])
        able = {c.name: c.seconds for c in found if not c.reason_not}
        order = ranked(op, Sizes(m, n, k, alpha), PUBLISHED[gpu])
        assert [able[name] for name in order] == sorted(able.values())[: len(order)] and order[-1] == EAGER


def test_one_token_reads_packed_labels_and_a_large_batch_of_many_children_does_not() -> None:
    assert ranked("split_matmul", Sizes(1, 14336, 4096, 2), PUBLISHED["h200"]) == ("packed labels", EAGER)
    assert ranked("split_matmul", Sizes(16384, 14336, 4096, 8), PUBLISHED["h200"]) == (EAGER,)
    assert ranked("split_matmul", Sizes(0, 14336, 4096, 2), PUBLISHED["h200"]) == (EAGER,)


def test_a_large_batch_of_merged_children_runs_on_sparse_tensor_cores() -> None:
    assert ranked("merge_matmul", Sizes(1, 14336, 4096, 2), PUBLISHED["4090"])[0] == "packed labels"
    assert ranked("merge_matmul", Sizes(8192, 14336, 4096, 2), PUBLISHED["4090"])[0] == "sparse tensor cores"
    assert ranked("merge_matmul", Sizes(8192, 14336, 4096, 2), PUBLISHED["h200"])[0] == "torch.sparse"
    assert "sparse tensor cores" not in ranked("merge_matmul", Sizes(8192, 14336, 4096, 8), PUBLISHED["4090"])


@pytest.mark.parametrize(("m", "wanted"), [(128, "packed labels"), (8192, "sparse tensor cores")])
def test_weights_that_change_are_compressed_for_large_batches_alone(m: int, wanted: str) -> None:
    sizes = ("merge_matmul", Sizes(m, 14336, 4096), PUBLISHED["4090"])
    assert ranked(*sizes)[0] == "sparse tensor cores"
    assert ranked(*sizes, constant=False)[0] == wanted


def test_forms_are_kept_of_weights_that_do_not_change() -> None:
    w = torch.ones(1, requires_grad=True)
    assert not stays(w, w)
    with torch.no_grad():
        assert stays(w, w)
        assert not stays(w, w.half())  # cast anew in every call
    frozen = w.detach()
    assert stays(frozen, frozen)


def test_a_roof_is_found_for_every_gpu(tmp_path: Path) -> None:
    assert roof_for("NVIDIA H200", 90) is PUBLISHED["h200"]
    unknown = roof_for("NVIDIA Something New", 90)
    assert unknown.arch == 90 and unknown.bandwidth == min(r.bandwidth for r in PUBLISHED.values() if r.arch == 90)
    assert roof_for("NVIDIA Something Newer", 999).arch == 120
    assert roof_for("NVIDIA Something Older", 75).arch == 80
    (tmp_path / "configs").mkdir()
    measured = {"name": "Mine", "arch": 90, "bandwidth": 1e12, "flops": {"bf16": 1e14}, "l2": 1e6, "integer": 1e13}
    (tmp_path / "configs/roof_mine_1.json").write_text(json.dumps(measured))
    with patch.object(dispatch, "files", lambda package: tmp_path):
        assert roof_for("Mine 1", 90).source == "measured"


class OnCuda:
    """A tensor that says it is on a GPU."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)

    def get_device(self) -> int:
        return 0


def test_auto_stays_open_only_where_both_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    operand: Tensor = OnCuda()  # type: ignore[assignment]
    monkeypatch.setattr(dispatch, "arch_of", lambda device: 90)
    assert choose_backend("op", "auto", operand, SPLIT, 2, by_cost=True) == "auto"
    assert choose_backend("op", "auto", operand, SPLIT, 2) == "triton"
    assert choose_backend("op", "auto", operand, SPLIT, 9) == "eager"
    assert choose_backend("op", "triton", operand, SPLIT, 2, by_cost=True) == "triton"
    for installed, chosen in ((True, dispatch.AUTO_ON_CPU), (False, "eager")):
        monkeypatch.setattr(dispatch, "numba_installed", lambda installed=installed: installed)
        assert choose_backend("op", "auto", torch.ones(1), SPLIT, 2, by_cost=True) == chosen


def test_an_open_choice_leaves_out_what_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    operand: Tensor = OnCuda()  # type: ignore[assignment]
    monkeypatch.setattr(dispatch, "arch_of", lambda device: 90)
    monkeypatch.setattr(dispatch, "ranked_on", lambda *call: ("packed labels", EAGER))
    assert dispatch.fastest("split_matmul", (1, 64, 64, 8), operand, SPLIT, 8) == "triton"
    assert dispatch.fastest("split_matmul", (1, 64, 64, 9), operand, SPLIT, 9) == "eager"
    monkeypatch.setattr(OnCuda, "dtype", torch.float64)
    assert dispatch.fastest("split_matmul", (1, 64, 64, 8), operand, SPLIT, 8) == "eager"


@pytest.mark.parametrize(
    ("arch", "version", "runs"),
    [
        *((100, version, version == (3, 7, 1)) for version in ((3, 6, 0), (3, 7, 0), (3, 7, 1))),
        *((arch, (3, 6, 0), True) for arch in (80, 89, 90, 120)),
        (103, (3, 6, 0), False),
    ],
)
def test_a_triton_that_leaves_out_a_fence_is_refused_where_no_kernel_can_set_it(
    arch: int, version: tuple[int, ...], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    operand: Tensor = OnCuda()  # type: ignore[assignment]
    monkeypatch.setattr(dispatch, "arch_of", lambda device: arch)
    monkeypatch.setattr(device, "triton_version", lambda: version)
    assert choose_backend("op", "auto", operand, SPLIT, 2) == ("triton" if runs else "eager")
    if not runs:
        with pytest.raises(UnsupportedError, match=f"capability {arch / 10} it needs Triton 3.7.1 or newer"):
            choose_backend("op", "triton", operand, SPLIT, 2)


@pytest.mark.parametrize("chosen", ["packed labels", EAGER])
def test_an_open_choice_is_made_when_the_operation_runs(chosen: str) -> None:
    asked = []

    def prefer(index: int, *call: object) -> tuple[str, ...]:
        asked.append(call[:2])
        return (chosen,)

    labels = PackedLabels.pack(torch.randint(2, (6, 20), generator=seeded(), dtype=torch.uint8), 2)
    x, w = torch.randn(3, 20, generator=seeded(1)), torch.randn(6, 20, generator=seeded(2)).requires_grad_()
    with patch.object(dispatch, "ranked_on", prefer):
        y = ops.split_matmul(x, w, labels.planes, [], None, None, 2, False, "auto")
        y.sum().backward()
    assert asked == [("split_matmul", (3, 6, 20, 2)), ("partition_grad", (3, 6, 20, 2))]
    torch.testing.assert_close(y, split_matmul(x, w, labels, 2, backend="eager"))


@pytest.mark.parametrize("alpha", [2, 4])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_merge_runs_as_2_to_4_where_that_comes_first_and_can_run(
    alpha: int, packed: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On small integers, where sums are exact."""
    labels = torch.randint(alpha + 1, (7, 9), generator=seeded(1), dtype=torch.uint8)  # some edges are nobody's
    shapes = ((3, alpha, 9), (7, 9), (7,))
    z, w, bias = (torch.randint(-4, 5, shape, generator=seeded(2)).bfloat16() for shape in shapes)
    owners = PackedLabels.pack(labels.T.contiguous(), alpha).T if transposed else PackedLabels.pack(labels, alpha)
    table = owners.planes if packed else labels
    weight = w.T.contiguous().T if transposed else w
    arguments = (z, weight, table, [], bias, "relu", True, packed and transposed)
    monkeypatch.setattr(dispatch, "ranked_on", lambda *sizes, **more: ("sparse tensor cores", EAGER))
    ran = []
    for reason in (None, "it is broken"):
        allow(monkeypatch, BACKENDS, "sparse_tensor_core", lambda *call, why=reason: ran.append(call[1:]) or why)
        with on_numpy():
            y = ops.merge_matmul(*arguments, "auto")
        assert torch.equal(y, merge_matmul(z, w, labels, bias, "relu", backend="eager"))
    assert ran == [(7, alpha * 9)] * 2


def test_gradients_of_a_merge_on_sparse_tensor_cores_run_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, BACKENDS, "torch")
    by_hand = as_merge(lambda x, w, alpha, layout, bias: x @ layout.to_dense(layout.from_parent(w))[0].T)
    monkeypatch.setitem(torch_sparse.OPERATIONS, "merge_matmul", by_hand)
    labels = torch.randint(2, (7, 9), generator=seeded(1), dtype=torch.uint8)
    z, w = torch.randn(3, 2, 9, generator=seeded(2)), torch.randn(7, 9, generator=seeded(3))
    gradients = []
    for backend in ("torch", "eager"):
        inputs = [z.clone().requires_grad_(), w.clone().requires_grad_()]
        y = merge_matmul(*inputs, labels, backend=backend)
        gradients.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_merge_says_why_it_cannot_run_as_2_to_4() -> None:
    z, w, labels = torch.randn(3, 3, 9), torch.randn(7, 9), torch.zeros(7, 9, dtype=torch.uint8)
    for alpha, says in ((3, "2 or 4 children, got 3"), (2, "CUDA")):
        with pytest.raises(ValueError, match=f"merge_matmul: backend 'torch' cannot run here: .*{says}"):
            merge_matmul(z[:, :alpha], w, labels, backend="torch")
    with pytest.raises(
        ValueError, match=r"merge_matmul: backend must be one of .*sparse_tensor_core, torch, got 'cuda'"
    ):
        merge_matmul(z, w, labels, backend="cuda")
