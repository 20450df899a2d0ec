"""The Triton block kernels under the interpreter: against float64 truth, with poisoned outputs and guard bands."""

import copy
from dataclasses import dataclass, replace
from itertools import product
from unittest.mock import patch

import pytest
import torch
from support import BadCall, assert_as_accurate, cast, expanded_layers, guarded, readable_id, seeded
from torch import Tensor, nn

import fpe
from fpe.bench.studies.data import load_digits
from fpe.kernels import BlockLayout, block_grad, block_matmul, block_matmul_t, device, tables
from fpe.kernels.block.config import Config, Problem, shared_bytes
from fpe.kernels.device import KNOWN
from fpe.kernels.tables import choose, parse

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRIAD = ((torch.float32, "triton"), (torch.float32, "eager"), (torch.float64, "eager"))


@dataclass(frozen=True)
class Case:
    """A block-masked weight and a batch."""

    n: int
    k: int
    block: tuple[int, int]
    m: int
    mask: str = "half"

    @property
    def id(self) -> str:
        return f"{self.n}x{self.k}-block{self.block[0]}x{self.block[1]}-m{self.m}-{self.mask}"

    def layout(self) -> BlockLayout:
        rows, cols = -(-self.n // self.block[0]), -(-self.k // self.block[1])
        mask = torch.rand(rows, cols, generator=seeded()) < 0.5
        if self.mask == "ragged":  # an empty and a full row, an empty and a full column
            mask[0], mask[-1], mask[:, 0], mask[:, -1] = False, True, False, True
        if self.mask in ("full", "empty"):
            mask[:] = self.mask == "full"
        return BlockLayout.from_mask(mask, (self.n, self.k), self.block)


CASES = (
    Case(64, 64, (16, 16), 5),
    Case(40, 70, (16, 32), 17, "ragged"),
    Case(130, 200, (64, 64), 33, "ragged"),
    Case(129, 131, (128, 128), 3, "full"),
    Case(67, 300, (32, 128), 1, "ragged"),
    Case(200, 33, (64, 16), 70),
    Case(1, 1, (16, 16), 1, "full"),
    Case(48, 48, (16, 16), 7, "empty"),
    Case(48, 48, (16, 16), 0),
    Case(0, 48, (16, 16), 3),
    Case(48, 0, (16, 16), 3),
)


pytestmark = pytest.mark.usefixtures("poisoned")


def operands(case: Case) -> tuple[BlockLayout, Tensor, Tensor, Tensor, Tensor]:
    layout = case.layout()
    values = guarded(layout.rows.shape[0], case.block[0] * case.block[1], seed=1)
    values.copy_(layout.from_dense(torch.randn(case.n, case.k, dtype=torch.float64, generator=seeded(2))).flatten(1))
    x, dy = guarded(case.m, case.k, seed=3), guarded(case.m, case.n, seed=4)
    return layout, values, x, dy, torch.randn(case.n, dtype=torch.float64, generator=seeded(5))


def compute(op: str, case: Case, dtype: torch.dtype, backend: str, activation: str | None = None) -> Tensor:
    layout, values, x, dy, bias = operands(case)
    v = cast(values, dtype).unflatten(1, case.block)
    if op == "forward":
        return block_matmul(cast(x, dtype), v, layout, bias.to(dtype), activation, backend=backend)
    if op == "dx":
        return block_matmul_t(cast(dy, dtype), v, layout, backend=backend)
    return block_grad(cast(dy, dtype), cast(x, dtype), layout, backend=backend)


def rounded_truth(op: str, case: Case, dtype: torch.dtype, activation: str | None = None) -> Tensor:
    """Float64 on the operands as the dtype holds them."""
    layout, values, x, dy, bias = (t.to(dtype).double() if isinstance(t, Tensor) else t for t in operands(case))
    v = values.unflatten(1, case.block)
    if op == "forward":
        return block_matmul(x, v, layout, bias, activation, backend="eager")
    return block_matmul_t(dy, v, layout, backend="eager") if op == "dx" else block_grad(dy, x, layout, backend="eager")


@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
@pytest.mark.parametrize("op", ["forward", "dx", "dw"])
@pytest.mark.parametrize("case", CASES, ids=readable_id)
def test_triad(case: Case, op: str, dtype: torch.dtype) -> None:
    ours, eager = compute(op, case, dtype, "triton"), compute(op, case, dtype, "eager")
    assert_as_accurate(ours, eager, rounded_truth(op, case, dtype))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
def test_activation_in_the_epilogue(activation: str, dtype: torch.dtype) -> None:
    case = CASES[1]
    ours, eager = (compute("forward", case, dtype, backend, activation) for backend in ("triton", "eager"))
    assert_as_accurate(ours, eager, rounded_truth("forward", case, dtype, activation))


CONFIGS = (
    Config(block_m=16, block_in=16, split=1, group=1, num_warps=4, num_stages=3),
    Config(block_m=16, block_in=32, split=4, group=3, num_warps=4, num_stages=3),
    Config(block_m=64, block_in=16, split=2, group=2, num_warps=4, num_stages=3),
    Config(block_m=32, block_in=64, split=8, group=8, num_warps=4, num_stages=3),
)


@pytest.mark.parametrize("op", ["forward", "dx", "dw"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"m{c.block_m}-in{c.block_in}-split{c.split}-group{c.group}")
def test_every_configuration_computes_the_same(config: Config, op: str) -> None:
    """Splits, more splits than blocks, partial groups of rows."""
    case = replace(CASES[2], m=150)
    with patch("fpe.kernels.block.triton.choose", return_value=config):
        ours = compute(op, case, torch.float32, "triton", "silu" if op == "forward" else None)
        again = compute(op, case, torch.float32, "triton", "silu" if op == "forward" else None)
    activation = "silu" if op == "forward" else None
    eager = compute(op, case, torch.float32, "eager", activation)
    assert_as_accurate(ours, eager, rounded_truth(op, case, torch.float32, activation))
    assert torch.equal(ours, again)


def test_gradients_are_the_eager_twins() -> None:
    layout, values, x, _, bias = operands(CASES[1])
    single = [cast(x, torch.float32), cast(values, torch.float32), bias.float()]

    def gradients(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).clone().requires_grad_() for t in single]
        y = block_matmul(leaves[0], leaves[1].unflatten(1, (16, 32)), layout, leaves[2], "gelu", backend=backend)
        return torch.autograd.grad(y.square().sum(), leaves)

    ours, eager, truth = (gradients(*how) for how in TRIAD)
    for triad in zip(ours, eager, truth, strict=True):
        assert_as_accurate(*triad)


def test_rows_do_not_depend_on_the_batch() -> None:
    layout, values, x, _, bias = operands(CASES[2])
    x, v, bias = cast(x, torch.float32), cast(values, torch.float32).unflatten(1, (64, 64)), bias.float()
    whole = block_matmul(x, v, layout, bias, backend="triton")
    for i in (0, 7, 32):
        torch.testing.assert_close(block_matmul(x[i], v, layout, bias, backend="triton"), whole[i])


def test_strided_and_batched_operands() -> None:
    layout, values, _, _, _ = operands(CASES[0])
    v = cast(values, torch.float32).unflatten(1, (16, 16))
    x = torch.randn(64, 3, 2, generator=seeded()).permute(2, 1, 0)
    bias = torch.randn(128, generator=seeded(1))[::2]
    ours, eager = (block_matmul(x, v, layout, bias, backend=backend) for backend in ("triton", "eager"))
    assert ours.shape == (2, 3, 64)
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("op", ["forward", "dx", "dw"])
def test_offsets_beyond_32_bits(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 2**30 elements apart: the third begins past 2**31. Untouched pages of the buffer cost no memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    layout, values, _, _, _ = operands(CASES[0])
    v, far = cast(values, torch.float32).unflatten(1, (16, 16)), torch.empty(2**31 + 64).as_strided((3, 64), (2**30, 1))
    near = torch.randn(3, 64, generator=seeded())
    far.copy_(near)
    compute = {
        "forward": lambda a, backend: block_matmul(a, v, layout, backend=backend),
        "dx": lambda a, backend: block_matmul_t(a, v, layout, backend=backend),
        "dw": lambda a, backend: block_grad(a, a, layout, backend=backend),
    }[op]
    assert torch.equal(compute(far, "triton"), compute(near, "triton"))
    torch.testing.assert_close(compute(far, "triton"), compute(near, "eager"))


@pytest.mark.parametrize("resparsify", ["input", "partition"])
def test_a_block_mlp_trains_as_the_eager_one(resparsify: str) -> None:
    data = load_digits()
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    losses: dict[str, list[float]] = {}
    for backend in ("triton", "eager"):
        wide = fpe.expand(dense, 2, structure="block", block=(16, 16), resparsify=resparsify, generator=seeded())  # type: ignore[arg-type]
        for layer in expanded_layers(wide):
            layer.backend = backend
        optimizer = torch.optim.Adam(wide.parameters(), lr=1e-2)
        losses[backend] = []
        for step in range(5):
            batch = slice(50 * step, 50 * (step + 1))
            loss = nn.functional.cross_entropy(wide(data.x[batch]), data.y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    torch.testing.assert_close(losses["triton"], losses["eager"], rtol=1e-5, atol=1e-6)
    assert losses["triton"][-1] < losses["triton"][0]


@pytest.mark.parametrize("op", ["block_matmul", "block_matmul_t", "block_grad"])
def test_opcheck(op: str) -> None:
    """The schema, the fake and the registered gradient hold for this backend too."""
    layout, values, x, dy, bias = operands(CASES[1])
    x, dy, v = (t.float().requires_grad_() for t in (x, dy, values.unflatten(1, (16, 32))))
    arguments = {
        "block_matmul": (x, v, *layout.tensors, bias.float(), None, *layout.shape, "triton"),
        "block_matmul_t": (dy, v, *layout.tensors, *layout.shape, "triton"),
        "block_grad": (dy, x, *layout.tensors, *layout.block, "triton"),
    }[op]
    torch.library.opcheck(getattr(torch.ops.fpe, op).default, arguments)


def block_layer() -> fpe.BlockLinear:
    torch.manual_seed(0)
    kept = fpe.Partition.block(32, 64, 2, block=(16, 16), generator=seeded()).masks().flatten(0, 1)
    return fpe.BlockLinear(kept, (16, 16), (2, 1), backend="triton")


def test_a_layer_compiles_whole_for_any_batch() -> None:
    layer, x = block_layer(), torch.randn(6, 64, generator=seeded())
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (x, x[:3]):
        torch.testing.assert_close(compiled(batch), layer(batch))


def test_autocast_reaches_the_kernel() -> None:
    layer, x = block_layer(), torch.randn(6, 64, generator=seeded())
    got = {}
    for layer.backend in ("triton", "eager"):
        with torch.autocast("cpu", torch.bfloat16):
            got[layer.backend] = layer(x)
    rounded = copy.deepcopy(layer).bfloat16().double()
    assert_as_accurate(got["triton"], got["eager"], rounded(x.bfloat16().double()))


# What Triton cannot run is refused by name, or left to the eager twin by "auto".


def call(block: tuple[int, int] = (16, 16), dtype: torch.dtype = torch.float32, backend: str = "triton") -> Tensor:
    layout = BlockLayout.from_mask(torch.ones(2, 2, dtype=torch.bool), (2 * block[0], 2 * block[1]), block)
    return block_matmul(
        torch.ones(1, 2 * block[1], dtype=dtype), torch.ones(4, *block, dtype=dtype), layout, backend=backend
    )


REFUSED = (
    BadCall("block", lambda: call((4, 16)), ValueError, ("block_matmul", "'triton'", "(16, 32, 64, 128)", "(4, 16)")),
    BadCall("dtype", lambda: call(dtype=torch.float64), ValueError, ("block_matmul", "bfloat16", "float64")),
)


@pytest.mark.parametrize("case", REFUSED, ids=readable_id)
def test_an_explicit_backend_says_why_it_cannot(case: BadCall) -> None:
    case.check()


def test_without_interpreter_or_gpu_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    BadCall("", call, ValueError, ("CUDA device", "cpu")).check()
    assert call(backend="auto").shape == (1, 32)


# Configurations.

SHAPES = tuple(product((16, 32, 64, 128), repeat=2))


@pytest.mark.parametrize("arch", KNOWN)
@pytest.mark.parametrize("op", ["block_matmul", "block_grad"])
def test_the_rule_always_chooses_what_can_run(arch: int, op: str) -> None:
    for block, m, itemsize, tiles in product(SHAPES, (1, 16, 17, 64, 1000, 8192), (2, 4), (1, 64, 448)):
        problem = Problem(op, m, block, tiles, 32, 4096, itemsize)
        config = choose(problem, KNOWN[arch])
        assert problem.fits(config, KNOWN[arch]), (problem, config)


def test_the_rule_fills_the_device_for_one_token() -> None:
    config = choose(Problem("block_matmul", 1, (128, 128), 32, 16, 4096, 2), KNOWN[90])
    assert config.block_m == 16 and config.split * 32 >= 128
    assert choose(Problem("block_matmul", 8192, (64, 64), 448, 32, 4096, 2), KNOWN[90]).split == 1


def test_the_rule_bounds_the_partial_sums() -> None:
    """At 64 rows a split's scratch stays under 4 % of the weights, unless the device would be half empty."""
    config = choose(Problem("block_matmul", 64, (64, 64), 64, 224, 28672, 2), KNOWN[90])
    assert config.split == 4 and 4 * 64 * 4 <= 0.04 * 224 * 64 * 2
    assert choose(Problem("block_matmul", 64, (64, 64), 16, 16, 2048, 2), KNOWN[90]).split > 1


@pytest.mark.parametrize("version", [(3, 6, 0), (3, 7, 1)])
def test_tf32_takes_narrow_tiles_where_the_assembler_would_serialise_wide_ones(
    version: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "triton_version", lambda: version)
    wide = Problem("block_matmul", 1024, (128, 64), 64, 32, 4096, 4, tf32=True)
    assert choose(wide, KNOWN[90]).block_m == (32 if version < (3, 7, 1) else 64)
    assert choose(replace(wide, tf32=False), KNOWN[90]).block_m == 64
    assert choose(replace(wide, block=(64, 128)), KNOWN[90]).block_m == 128
    assert choose(wide, KNOWN[80]).block_m == 64


def test_the_rule_groups_rows_by_what_l2_holds() -> None:
    groups = [choose(Problem("block_matmul", 8192, (64, 64), 448, 32, k, 2), KNOWN[90]).group for k in (4096, 14336)]
    assert groups[0] > groups[1] >= 4


def test_few_configurations_serve_all_batch_sizes() -> None:
    """No recompilation for a batch size: over 1 .. 8192 rows a layer meets a handful of configurations."""
    met = {choose(Problem("block_matmul", m, (64, 64), 448, 32, 4096, 2), KNOWN[90]) for m in range(1, 8193)}
    assert len(met) <= 8


@pytest.mark.parametrize(
    "change",
    [{"block_m": 8}, {"block_m": 48}, {"block_in": 128}, {"num_stages": 0}, {"split": 3}, {"num_stages": 99}],
    ids=str,
)
def test_an_impossible_configuration_is_invalid(change: dict[str, int]) -> None:
    good, problem = Config(64, 32, 2, 8, 4, 5), Problem("block_matmul", 64, (64, 64), 64, 32, 4096, 2)
    assert problem.fits(good, KNOWN[80])
    assert not problem.fits(replace(good, **change), KNOWN[80])


def test_shared_memory_of_the_pipeline() -> None:
    config = Config(64, 32, 1, 8, 4, 7)
    problem = Problem("block_matmul", 64, (128, 64), 64, 32, 4096, 2)
    assert shared_bytes(problem, config) == 3 * 32 * (64 + 128) * 2
    assert shared_bytes(replace(problem, op="block_grad"), config) == 6 * 64 * (128 + 64) * 2


def test_a_tuned_entry_goes_before_the_rule() -> None:
    fields = {"block_m": 32, "block_in": 16, "split": 1, "group": 4, "num_warps": 2, "num_stages": 3}
    entry = {"op": "block_matmul", "max_m": 64, "block": [64, 64], "itemsize": 2, "config": fields}
    too_large = {**entry, "max_m": 1024, "config": {**fields, "block_m": 4096, "num_stages": 9}}
    table = parse({"provenance": {"device": "a test"}, "entries": [too_large, entry]}, Config)
    assert [e.max_m for e in table] == [64, 1024]
    with patch.object(tables, "tuned", return_value=table):
        problem = Problem("block_matmul", 64, (64, 64), 448, 32, 4096, 2)
        assert choose(problem, KNOWN[90]) == Config(**fields)
        assert choose(replace(problem, m=65), KNOWN[90]).block_m == 128  # that entry is invalid: the rule
        assert choose(replace(problem, itemsize=4), KNOWN[90]) != Config(**fields)
