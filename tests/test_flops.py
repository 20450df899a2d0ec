"""PyTorch's counter of FLOPs: what it counts for the operations and for expanded models, whenever it is imported."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from every_op import KEPT_SPLITS, OPS, Case, Maker
from support import SIZES, Recipe, mlp, readable_id
from torch.utils.flop_counter import FlopCounterMode

from fpe.kernels.flops import FORMULAS

M, N, K, OUT = 3, 16, 24, 5
COUNTS = {
    **dict.fromkeys(("split_matmul", "merge_matmul", "partition_grad"), 2 * M * N * K),
    **dict.fromkeys(("semi_structured_matmul", "semi_structured_matmul_t", "semi_structured_grad"), 2 * M * N * K),
    "semi_structured_compress": 0,
    "expanded_mlp": 2 * M * (K * N + 2 * N * OUT),
    **dict.fromkeys(("unpack_values", "pack_values"), 0),
}


def counted(run: object) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        run()  # type: ignore[operator]
    return {str(op).removeprefix("fpe."): n for op, n in counter.get_flop_counts().get("Global", {}).items()}


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_an_operation_counts_its_stored_weights(op: str, backend: str) -> None:
    case = Case(op, backend, torch.float16, (M,), N, K, block=(16, 16), outputs=OUT, seed=1)
    problem = Maker(case).problem()
    blocks = len(Maker(case).blocks()[2].rows)
    assert 0 < blocks < 2
    stored = Maker(case).kept()[1].nnz if op in KEPT_SPLITS or op == "kept_grad" else blocks * 16 * 16
    total = sum(counted(lambda: problem.ours(*problem.operands)).values())
    assert total == COUNTS.get(op, 2 * M * stored)


def test_a_merged_mlp_reads_each_weight_of_its_second_layer_once() -> None:
    case = replace(Case("expanded_mlp", lead=(M,), n=N, k=K, outputs=OUT), merged=True)
    problem = Maker(case).problem()
    assert sum(counted(lambda: problem.ours(*problem.operands)).values()) == 2 * M * (K * N + N * OUT)


@pytest.mark.parametrize(
    "recipe", [Recipe(resparsify="partition"), Recipe(resparsify="partition", alpha=4)], ids=readable_id
)
def test_an_expanded_model_counts_what_its_parent_does_forward_and_backward(recipe: Recipe) -> None:
    dense = mlp(*SIZES)
    wide = recipe.expand(dense)
    x = torch.ones(4, SIZES[0], requires_grad=True)
    parent = counted(lambda: dense(x).sum().backward())
    own = counted(lambda: wide(x).sum().backward())
    assert sum(own.values()) == sum(parent.values()) == 3 * 2 * 4 * (SIZES[0] * SIZES[1] + SIZES[1] * SIZES[2])
    assert set(own) <= set(FORMULAS)


EITHER_ORDER = """
import sys
{first}
import torch
from torch.utils.flop_counter import FlopCounterMode
from fpe import kernels
x, w, labels = torch.ones(2, 8), torch.ones(4, 8), torch.zeros(4, 8, dtype=torch.uint8)
with FlopCounterMode(display=False) as counter:
    kernels.split_matmul(x, w, labels, 2)
print(counter.get_total_flops())
"""


@pytest.mark.parametrize("first", ["import fpe.kernels; assert 'torch.utils.flop_counter' not in sys.modules", ""])
def test_whichever_is_imported_first(first: str) -> None:
    command = [sys.executable, "-c", EITHER_ORDER.format(first=first)]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == 2 * 2 * 4 * 8
