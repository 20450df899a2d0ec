"""Other people's programs: PyTorch's 2:4 weight is handed what its own class wants, in every version that we run on."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from support import allow
from torch import Tensor

from fpe.bench.latency import peers
from fpe.bench.latency.problems import AbsentError, Case, Problem
from fpe.kernels.semi_structured.backends import BACKENDS


def problem(m: int = 5, n: int = 16, k: int = 64, dtype: str = "bf16") -> Problem:
    return Problem.make(Case(m, n, k, 2, "2:4", dtype), "cpu")


class Library:
    """cuSPARSELt by its definition, on the CPU: it refuses what the real one would, and notes what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.searched: list[tuple[torch.Size, bool]] = []
        self.ran: list[tuple[torch.Size, bool, int]] = []
        allow(monkeypatch, BACKENDS, "torch")
        monkeypatch.setattr(peers, "has_cusparselt", lambda: True)
        kinds = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
        monkeypatch.setattr(kinds, "_validate_device_dim_dtype_shape", lambda tensor: None)
        monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense.clone())
        monkeypatch.setattr(torch, "_cslt_sparse_mm_search", self.search)
        monkeypatch.setattr(torch, "_cslt_sparse_mm", self.multiply)

    def search(self, packed: Tensor, columns: Tensor, transpose_result: bool = False) -> int:
        assert columns.shape[1] % 8 == 0
        self.searched.append((columns.shape, transpose_result))
        return 7

    def multiply(
        self, packed: Tensor, columns: Tensor, bias: Tensor | None, transpose_result: bool, alg_id: int
    ) -> Tensor:
        assert columns.shape[1] % 8 == 0
        self.ran.append((columns.shape, transpose_result, alg_id))
        y = packed @ columns if bias is None else packed @ columns + bias[:, None]
        return y.t().contiguous() if transpose_result else y


@pytest.mark.parametrize("m", [1, 5, 16])
@pytest.mark.parametrize("bias", [False, True])
def test_torch_24_runs_with_the_algorithm_that_was_searched_for_it(
    m: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, made = Library(monkeypatch), problem(m)
    layer = peers.semi_structured(made, bias)
    y = layer(made.x)
    want = torch.nn.functional.linear(made.x, made.wide)
    torch.testing.assert_close(y, want)
    ((shape, transposed),) = library.searched
    assert library.ran == [(shape, transposed, 7)] and transposed


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: problem(), "CUDA device"),
        (lambda: on_gpu(problem(dtype="fp32"), (9, 0)), "takes float16, bfloat16, got float32"),
        (lambda: on_gpu(problem(n=17), (9, 0)), "multiples of 16, got 34 and 64|multiples of 16 and inputs"),
        (lambda: on_gpu(problem(), (9, 0), cusparselt=False), "no cuSPARSELt, and its CUTLASS kernels take .* got 9.0"),
        (lambda: on_gpu(problem(), (7, 5)), "8.0 or newer, got 7.5"),
    ],
    ids=["cpu", "dtype", "shape", "build", "old"],
)
def test_torch_24_is_absent_for_a_reason(
    make: Callable[[], Problem], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make()
    if isinstance(made, SimpleNamespace):
        monkeypatch.setattr("fpe.kernels.semi_structured.torch_sparse.has_cusparselt", lambda: made.cusparselt)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: made.properties)
    with pytest.raises(AbsentError, match=says):
        peers.semi_structured(made, False)


def on_gpu(made: Problem, arch: tuple[int, int], cusparselt: bool = True) -> SimpleNamespace:
    """A problem whose activations say that they are on a GPU."""
    x = SimpleNamespace(is_cuda=True, dtype=made.x.dtype, device="cuda:0", shape=made.x.shape)
    properties = SimpleNamespace(major=arch[0], minor=arch[1])
    return SimpleNamespace(x=x, wide=made.wide, weight=made.weight, properties=properties, cusparselt=cusparselt)
