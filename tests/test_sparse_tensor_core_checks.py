"""What stands around the kernel on sparse tensor cores: its self-check, its configurations and its machine code."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from click.testing import CliRunner
from gluon_numpy import on_numpy
from support import ROOT, readable_id
from torch import Tensor

pytest.importorskip("triton")

from fpe.bench.lab.cli import lab
from fpe.bench.lab.compile import check
from fpe.bench.report.summary import sparse_rates
from fpe.kernels import (
    SemiStructuredLayout,
    semi_structured_matmul,
)
from fpe.kernels.device import KNOWN
from fpe.kernels.semi_structured import sparse_tensor_core
from fpe.kernels.semi_structured.config import SparseProblem, stage_bytes
from fpe.kernels.tables import choose

KINDS = {torch.bfloat16: "bf16", torch.float16: "f16"}
each_dtype = pytest.mark.parametrize("dtype", KINDS, ids=readable_id)


# The self-check.


@each_dtype
def test_the_self_check_passes_the_kernel(dtype: torch.dtype) -> None:
    run = sparse_tensor_core.semi_structured_matmul_sparse_tensor_core
    with on_numpy():
        assert sparse_tensor_core.self_check(run, torch.device("cpu"), dtype) is None


def test_the_self_check_tries_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sparse_tensor_core.split_matmul_seeded
    run = sparse_tensor_core.semi_structured_matmul_sparse_tensor_core
    monkeypatch.setattr(sparse_tensor_core, "split_matmul_seeded", lambda *args: real(*args).roll(1, -1))
    with on_numpy():
        complaint = sparse_tensor_core.self_check(run, torch.device("cpu"), torch.float16)
    assert str(complaint).endswith("differ from the eager twin's, with labels of a seed")


def test_the_self_check_says_what_is_wrong() -> None:
    def one_wrong(x: Tensor, values: Tensor, layout: SemiStructuredLayout) -> Tensor:
        y = semi_structured_matmul(x.double(), values.double(), layout)
        y[-1, -1, -1] += layout.children == 2
        return y

    def fails(x: Tensor, values: Tensor, layout: SemiStructuredLayout) -> Tensor:
        raise RuntimeError("no such instruction")

    check = sparse_tensor_core.self_check
    assert "1 of " in str(check(one_wrong, torch.device("cpu"), torch.bfloat16))
    assert "RuntimeError: no such instruction" in str(check(fails, torch.device("cpu"), torch.float16))


@pytest.mark.parametrize("name", ["pack_values", "pack_parent", "pack_transposed"])
def test_the_self_check_sees_a_packing_that_is_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(sparse_tensor_core, name)
    monkeypatch.setattr(sparse_tensor_core, name, lambda *args: real(*args).roll(1, -1))
    eager = sparse_tensor_core.semi_structured_matmul_eager
    check = sparse_tensor_core.self_check(eager, torch.device("cpu"), torch.bfloat16)
    what = {
        "pack_values": "values",
        "pack_parent": "a parent's rows",
        "pack_transposed": "values seen from their outputs",
    }
    assert check == f"{what[name]} are packed otherwise than by the eager packing"


@pytest.fixture
def unseen() -> Iterator[None]:
    """Devices as if none had been checked."""
    sparse_tensor_core._is_sound.cache_clear()
    yield
    sparse_tensor_core._is_sound.cache_clear()


@pytest.mark.usefixtures("unseen")
def test_a_failed_self_check_warns_once_and_disables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_tensor_core, "self_check", lambda run, device, dtype: "all is wrong")
    with pytest.warns(UserWarning, match="disabled for torch.float16 on cpu: all is wrong"):
        assert not sparse_tensor_core.is_sound(torch.device("cpu"), torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not sparse_tensor_core.is_sound(torch.device("cpu"), torch.float16)


@pytest.mark.usefixtures("unseen")
def test_torch_compile_asks_the_self_check_and_does_not_trace_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(run: object, device: torch.device, dtype: torch.dtype) -> str | None:
        torch._dynamo.graph_break()  # would be an error in what is traced
        return None

    monkeypatch.setattr(sparse_tensor_core, "self_check", check)
    torch._dynamo.reset()
    double = torch.compile(
        lambda x: 2 * x if sparse_tensor_core.is_sound(x.device, x.dtype) else x, fullgraph=True, backend="eager"
    )
    assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))


# Configurations and machine code.


@pytest.mark.parametrize("arch", KNOWN)
@pytest.mark.parametrize("children", [1, 2])
def test_the_rule_fits_and_fills(arch: int, children: int) -> None:
    device = KNOWN[arch]
    for m in (1, 8, 9, 64, 100, 8192):
        config = choose(SparseProblem(m, 14336, 4096, children), device)
        assert config.block_m in (8, 16, 32, 64, 128) and config.block_m * children <= 128
        assert config.num_stages >= 2 and config.num_stages * stage_bytes(config.block_m, children) <= device.shared
    assert choose(SparseProblem(1, 4096, 4096, children), device).split * 32 >= device.sms / 2
    assert choose(SparseProblem(8192, 4096, 4096, children), device).split == 1
    partial_sums = 4 * children * 64 * 14336 * 2 * 2  # written and read, of two parts
    assert (
        partial_sums > 0.04 * 14336 * 4096 * children
        and choose(SparseProblem(64, 14336, 4096, children), device).split == 1
    )


COMPILE = """
import json
from fpe.bench.families.semi_structured import Case
from fpe.bench.lab.compile import run
pairs = [
    (Case("sparse", "bf16", 64), 80), (Case("sparse", "fp16", 1, 1), 90), (Case("sparse", "bf16", 1024, 1), 120),
    (Case("sparse", "bf16", 64, seeded=True), 80),
    (Case("forward", "bf16", 64), 90), (Case("dx", "fp16", 64), 80), (Case("dw", "bf16", 64, 1), 100),
    (Case("compress", "bf16", 1), 90), (Case("pack parent.T into fragments", "bf16", 1), 90),
    (Case("pack transposed values into dense", "bf16", 1), 80),
]
print(json.dumps([row for case, arch in pairs for row in run([case], [arch], 1).rows]))
"""


def test_what_ships_compiles_as_meant() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["complaints"] for row in rows] == [[]] * 10
    assert rows[0]["matrix"] == ["HMMA.SP.16832.F32.BF16"] and rows[1]["matrix"] == ["HMMA.SP.16832.F32"]
    assert rows[0]["loop_instructions"] < 4 * 64  # 64 instructions multiply; what else the loop does is no burden
    assert rows[3]["matrix"] == rows[0]["matrix"] and rows[3]["loop_instructions"] < rows[0]["loop_instructions"] + 32


ROW = {
    "kernel": "sparse_tensor_core",
    "arch": 80,
    "op": "sparse",
    "dtype": "bf16",
    "spill_stores": 0,
    "spill_loads": 0,
    "local": 0,
    "stack": 0,
    "shared": 73_728,
    "programs_per_sm": 2,
    "limited_by": "shared",
    "matrix": ["HMMA.SP.16832.F32.BF16"],
    "load_bits": 128,
    "hazards": {},
    "first_hazard": "",
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"spill_stores": 12}, "12 bytes stored"),
        ({"shared": 200_000}, "200000 bytes of 166912"),
        ({"programs_per_sm": 0}, "does not fit"),
        ({"matrix": ["HMMA.16816.F32.BF16"]}, "meant HMMA.SP.16832, got HMMA.16816"),
        ({"matrix": []}, "got none"),
        ({"load_bits": 32}, "of 32 bits"),
        ({"kernel": "_multiply", "op": "forward", "dtype": "fp32"}, "HMMA.SP.16832 for fp32"),
        ({"kernel": "_outer", "op": "dw", "matrix": []}, "none for bf16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_lab_complains(change: dict, says: str) -> None:
    assert check(ROW) == [] and check({**ROW, "matrix": ["HMMA.SP.16832.F32"]}) == []
    (complaint,) = check({**ROW, **change})
    assert says in complaint


def test_the_command_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted = CliRunner().invoke(lab, ["compile", "--op", "2:4"])
    assert interpreted.exit_code == 1 and "TRITON_INTERPRET" in interpreted.output
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    unknown = CliRunner().invoke(lab, ["compile", "--op", "2:4", "--arch", "75"])
    assert unknown.exit_code == 2 and "80, 86, 89, 90, 100, 120, got 75" in " ".join(unknown.output.split())
    none = CliRunner().invoke(lab, ["compile", "--op", "grad_t", "--quick"])
    assert none.exit_code == 2 and "--quick has no case of grad_t" in " ".join(none.output.split())


def test_the_rates_are_bounds_by_arithmetic() -> None:
    rows = {row[0].split("sm_")[1]: row for row in sparse_rates().rows}
    assert list(rows) == [str(arch) for arch in KNOWN]
    assert rows["80"][3:] == ("2.00", "mma.sp", "2.00", "1.00")
    assert rows["90"][3:] == ("1.26", "wgmma.sp", "2.00", "1.59")
    assert rows["100"][2:4] == ("-", "-")
