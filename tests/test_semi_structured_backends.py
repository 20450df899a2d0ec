"""How a backend of the 2:4 operations is chosen, what it is given, and what is refused by name."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from semi_structured_cases import OPS, Case, operands
from support import BadCall, readable_id, seeded
from torch import Tensor
from torch.nn.functional import linear

from fpe.kernels import (
    SemiStructuredLayout,
    dispatch,
    semi_structured_compress,
    semi_structured_grad,
    semi_structured_matmul,
    semi_structured_matmul_t,
)
from fpe.kernels.device import KNOWN
from fpe.kernels.memo import once_per_version
from fpe.kernels.model import Sizes
from fpe.kernels.roofs import PUBLISHED
from fpe.kernels.semi_structured import backends
from fpe.kernels.semi_structured import ops as semi_structured_ops
from fpe.kernels.semi_structured import torch_sparse as torch_backend
from fpe.kernels.semi_structured.config import Problem
from fpe.kernels.tables import choose

# What cannot run is refused by name, or left to another path by "auto".


def call(backend: str, dtype: torch.dtype = torch.float32, n: int = 7, k: int = 24) -> Tensor:
    case = Case(n=n, k=k)
    return OPS["forward"](*operands("forward", case, dtype), case.layout(), backend)


REFUSED = (
    BadCall("name", lambda: call("cuda"), ValueError, ("sparse_tensor_core", "'cuda'")),
    BadCall("sparse-cpu", lambda: call("sparse_tensor_core"), ValueError, ("'sparse_tensor_core'", "CUDA", "cpu")),
    BadCall("torch-cpu", lambda: call("torch"), ValueError, ("'torch'", "CUDA device", "cpu")),
    BadCall("triton-dtype", lambda: call("triton", torch.float64), ValueError, ("bfloat16", "float64")),
    BadCall(
        "values",
        lambda: semi_structured_matmul(torch.ones(2, 24), torch.ones(2, 7, 10), Case().layout()),
        ValueError,
        ("values", "[2, 7, 12]", "[2, 7, 10]"),
    ),
    BadCall(
        "x",
        lambda: semi_structured_matmul(torch.ones(2, 23), torch.ones(2, 7, 12), Case().layout()),
        ValueError,
        ("x", "[..., 24]", "[2, 23]"),
    ),
    BadCall(
        "dy",
        lambda: semi_structured_matmul_t(torch.ones(2, 1, 7), torch.ones(2, 7, 12), Case().layout()),
        ValueError,
        ("dy", "[..., 2, 7]", "[2, 1, 7]"),
    ),
    BadCall("layout", lambda: semi_structured_grad(torch.ones(2), torch.ones(2), None), TypeError, ("Layout", "None")),  # type: ignore[arg-type]
    BadCall("w", lambda: semi_structured_compress(torch.ones(7, 23), Case().layout()), ValueError, ("w", "[7, 24]")),
)


@pytest.mark.parametrize("case", REFUSED, ids=readable_id)
def test_bad_calls(case: BadCall) -> None:
    case.check()


@dataclass
class OnGpu:
    """Stands for activations on a GPU where only the choice of a backend is tested."""

    dtype: torch.dtype = torch.bfloat16
    is_cuda: bool = True
    device: str = "cuda:0"
    shape: tuple[int, ...] = (1,)

    def get_device(self) -> int:
        return 0


NO_CODES = torch.empty(0, dtype=torch.uint8)
FITS_CUSPARSELT = Case(n=16, k=32)


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    arch: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    sound: bool = True,
    cusparselt: bool = True,
    case: Case = FITS_CUSPARSELT,
    triton: bool = True,
    op: str = "op",
) -> str:
    properties = SimpleNamespace(major=arch[0], minor=arch[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    roof = next(r for r in PUBLISHED.values() if r.arch == 10 * arch[0] + arch[1]) if arch >= (8, 0) else None

    def ranked_on(index: int, op: str, sizes: tuple, dtype: str, structure: str, *weight: bool) -> tuple[str, ...]:
        return dispatch.ranked(op, Sizes(*sizes, structure, dtype), roof, *weight)  # type: ignore[arg-type]

    monkeypatch.setattr(dispatch, "ranked_on", ranked_on)
    for module in (backends, dispatch):
        monkeypatch.setattr(module, "triton_installed", lambda: triton)
    monkeypatch.setattr("fpe.kernels.semi_structured.sparse_tensor_core.is_sound", lambda device, dtype: sound)
    monkeypatch.setattr(torch_backend, "has_cusparselt", lambda: cusparselt)
    own, layout = OnGpu(dtype, shape=(case.m,)), case.layout()
    weight = (layout.children * layout.shape[0], layout.shape[1])
    resolved = dispatch.choose_backend("op", backend, own, backends.BACKENDS, *weight, by_cost=True)  # type: ignore[arg-type]
    return backends.fastest(op, own, layout) if resolved == "auto" else resolved  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("op", "m", "children", "wanted", "without", "then"),
    [
        ("semi_structured_matmul", 8192, 2, "sparse_tensor_core", {"sound": False}, "torch"),
        ("semi_structured_matmul", 8192, 1, "sparse_tensor_core", {"cusparselt": False, "sound": False}, "torch"),
        ("semi_structured_matmul", 1, 2, "triton", {"triton": False}, "torch"),
        ("semi_structured_matmul", 1, 2, "triton", {"dtype": torch.float32}, "triton"),
        ("semi_structured_matmul", 1, 2, "triton", {"dtype": torch.float64}, "eager"),
        ("semi_structured_matmul", 0, 2, "eager", {}, "eager"),
        ("semi_structured_matmul_t", 8192, 2, "sparse_tensor_core", {"sound": False}, "torch"),
        ("semi_structured_matmul_t", 8192, 1, "eager", {}, "eager"),
        ("semi_structured_matmul_t", 1, 1, "triton", {"triton": False}, "eager"),
        ("semi_structured_grad", 1, 2, "triton", {"triton": False}, "eager"),
    ],
)
def test_auto_takes_what_is_predicted_fastest_of_what_can_run(
    op: str, m: int, children: int, wanted: str, without: dict, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(m=m, n=4096, k=4096, children=children)
    monkeypatch.setattr(Case, "layout", lambda case: SemiStructuredLayout((case.n, case.k), NO_CODES, None, children))
    assert chosen(monkeypatch, "auto", (8, 9), case=case, op=op) == wanted
    assert chosen(monkeypatch, "auto", (8, 9), case=case, op=op, **without) == then


def test_hopper_multiplies_large_batches_by_cusparselt() -> None:
    layout = SemiStructuredLayout((4096, 14336), NO_CODES, None, 2)
    op, given = backends.as_partition("semi_structured_matmul", 8192, layout)
    sizes = Sizes(*given, "2:4")
    assert dispatch.ranked(op, sizes, PUBLISHED["h200"])[0] == "torch.sparse"
    assert dispatch.ranked(op, sizes, PUBLISHED["4090"])[0] == "sparse tensor cores"
    assert "sparse tensor cores" not in dispatch.ranked(op, sizes, PUBLISHED["b200"])


@pytest.mark.parametrize("op", OPS, ids=str)
def test_auto_decides_when_the_operation_runs(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, asked = Case(), []
    monkeypatch.setattr("fpe.kernels.semi_structured.api.choose_backend", lambda *args, **more: "auto")
    monkeypatch.setattr(semi_structured_ops, "fastest", lambda name, x, *rest: asked.append((name, len(x))) or "triton")
    OPS[op](*operands(op, case, torch.float16), case.layout(), "auto")
    assert [m for _, m in asked] == [case.m]


def test_an_explicit_backend_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*says: str, **how: object) -> None:
        BadCall("", lambda: chosen(monkeypatch, **how), ValueError, says).check("op", "cannot run here")  # type: ignore[arg-type]

    refused("8.0", "7.5", backend="sparse_tensor_core", arch=(7, 5))
    refused("self-check", backend="sparse_tensor_core", arch=(9, 0), sound=False)
    refused("bfloat16", "float32", backend="sparse_tensor_core", arch=(9, 0), dtype=torch.float32)
    refused("not installed", backend="triton", arch=(9, 0), triton=False)
    refused("no cuSPARSELt", "8.x", "9.0", backend="torch", arch=(9, 0), cusparselt=False)
    refused("cuSPARSELt", "multiples of 16", "14", backend="torch", arch=(9, 0), case=Case(n=7, k=32))
    refused("CUTLASS", "of 64", "32", backend="torch", arch=(8, 0), cusparselt=False)
    assert chosen(monkeypatch, "torch", (8, 0), cusparselt=False, case=Case(n=16, k=64)) == "torch"
    assert chosen(monkeypatch, "torch", (9, 0)) == "torch"


@pytest.mark.parametrize("library", ["cuSPARSELt", "CUTLASS"])
@pytest.mark.parametrize("children", [1, 2])
@pytest.mark.parametrize("triton", [True, False], ids=["packed by Triton", "without Triton"])
def test_torch_sparse_is_called_with_what_it_wants(
    library: str, children: int, triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's kernels are replaced by their definition: padded rows, orientation, one search for each shape."""
    case = Case(m=5, n=64, k=64, children=children)
    searches = []

    def search(packed: Tensor, columns: Tensor, bias: Tensor | None, transpose_result: bool) -> int:
        searches.append(columns.shape)
        return 3

    def cslt(packed: Tensor, columns: Tensor, bias: Tensor | None, transpose_result: bool, alg_id: int) -> Tensor:
        assert alg_id == 3 and transpose_result and columns.shape[1] % 8 == 0 and columns.stride(0) == 1
        return linear(columns.t(), packed, bias)

    def cutlass(packed: Tensor, metadata: Tensor, columns: Tensor) -> Tensor:
        assert columns.shape[1] % 8 == 0
        dense = torch.sparse._semi_structured_conversions.sparse_semi_structured_to_dense_cutlass(packed, metadata)
        return dense @ columns

    def cutlass_with_bias(bias: Tensor, packed: Tensor, metadata: Tensor, columns: Tensor) -> Tensor:
        return cutlass(packed, metadata, columns) + bias[:, None]

    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", cslt)
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", cutlass)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", cutlass_with_bias)
    monkeypatch.setattr(torch_backend, "_ALGORITHMS", {})
    monkeypatch.setattr(torch_backend, "has_cusparselt", lambda: library == "cuSPARSELt")
    monkeypatch.setattr(torch_backend, "_on_gpu", lambda values: True)
    if not triton:
        monkeypatch.setattr(torch_backend, "why_not_triton", lambda values: "it is not installed")
        monkeypatch.setitem(sys.modules, "fpe.kernels.semi_structured.pack", None)
    layout, (w, x, dy) = case.layout(), (t.round() for t in case.tensors(torch.bfloat16))
    values = layout.from_dense(w)
    for _ in range(2):
        y = torch_backend.semi_structured_matmul_torch(x, values, layout)
        dx = torch_backend.semi_structured_matmul_t_torch(dy, values, layout)
    bias = torch.arange(children * 64.0).view(children, 64).bfloat16()
    with_bias = torch_backend.semi_structured_matmul_torch(x, values, layout, bias)
    assert torch.equal(with_bias, semi_structured_matmul(x, values, layout, bias))
    assert torch.equal(y, OPS["forward"](x, values, layout, "eager"))
    assert torch.equal(dx, OPS["dx"](dy, values, layout, "eager"))
    assert len(searches) == (0 if library == "CUTLASS" else children + 1)  # with a bias once more
    labels = torch.randint(3, (64, 32), generator=seeded(5)).to(torch.uint8)
    merged = SemiStructuredLayout.interleaved(labels)
    parent, shift = w[:, :32], torch.arange(64.0).bfloat16()
    y = torch_backend.multiply_interleaved(x, parent, 2, merged, shift)
    assert torch.equal(y, linear(x, merged.to_dense(merged.from_parent(parent))[0], shift))


# Once for each version.


def test_what_is_kept_is_made_anew_when_something_changes() -> None:
    made = []
    remembered = once_per_version(lambda values, *rest: made.append(rest) or len(made))
    values, codes, other = torch.zeros(3), torch.zeros(2), torch.zeros(2)
    assert [remembered(values, codes, 1), remembered(values, codes, 1)] == [1, 1]
    values.add_(1)
    assert remembered(values, codes, 1) == 2
    assert remembered(values, other, 1) == 3
    other.add_(1)
    assert remembered(values, other, 1) == 4
    assert remembered(values, other, 2) == 5
    assert remembered(values.clone(), other, 2) == 6
    with torch.inference_mode():
        fresh = torch.zeros(3)
    assert [remembered(fresh, codes), remembered(fresh, codes)] == [7, 8]


# Configurations.


@pytest.mark.parametrize("arch", KNOWN)
def test_the_rule_fills_the_device_and_is_bounded(arch: int) -> None:
    sides = [16, 32, 64, 128]
    for op in ("semi_structured_matmul", "semi_structured_matmul_t", "semi_structured_grad"):
        for itemsize in (2, 4):
            met = {choose(Problem(op, m, 14336, 4096, 2, itemsize), KNOWN[arch]) for m in range(1, 4097)}
            assert len(met) <= 16
            assert all(c.block_m in sides and c.block_n in sides and c.block_k in sides for c in met)
    one = choose(Problem("semi_structured_matmul", 1, 4096, 4096, 2, 2), KNOWN[90])
    assert one.block_m == 16 and 64 * one.split >= KNOWN[90].sms
    assert choose(Problem("semi_structured_matmul", 8192, 4096, 4096, 2, 2), KNOWN[90]).split == 1
