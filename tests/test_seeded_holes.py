"""Holes of a seed: the function as it is written down, its statistics, every operation and layers that have them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import BadCall, allow, integers, mlp, readable_id, seeded
from torch import Tensor, nn

import fpe
from fpe.kernels import (
    PackedLabels,
    SeededHoles,
    SeededLabels,
    merge_matmul,
    pack_values,
    partition_grad,
    split_matmul,
    unpack_values,
)
from fpe.kernels.bitmap import holes
from fpe.kernels.device import KNOWN
from fpe.kernels.partition import kept

SPECIFICATION = Path(__file__).resolve().parents[1] / "docs/seeded.md"
SHAPES = [(64, 512, 412), (9, 139, 57), (17, 784, 10), (5, 33, 33), (3, 20, 1), (40, 300, 299)]


def by_the_book(seed: int, n: int, k: int, inputs: int, count: int) -> int:
    """Whether an entry exists in plain integers, line by line as ``docs/seeded.md`` has it."""

    def mixed(x: int) -> int:
        x %= 2**32
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    w = k // 32
    size = min(32, inputs - 32 * w)
    q = (32 * w + size) * count // inputs - 32 * w * count // inputs
    h = mixed(mixed(seed + 0x3C6EF372) + n * 0x9E3779B1 + w * 0x85EBCA77)
    bits = [int(j < q) for j in range(size)]
    for s in (16, 8, 4, 2, 1):
        for j in range(size - s):
            if not j & s and h >> j & 1:
                bits[j], bits[j + s] = bits[j + s], bits[j]
        h = (h ^ h >> 15) * 0x9E3779B1 % 2**32
    return bits[k % 32]


def vectors() -> list[tuple[int, int, int, int, str]]:
    """Seed, inputs, entries of a row, row and its first entries, of the test vectors in the document."""
    rows = [line.split("|")[1:-1] for line in SPECIFICATION.read_text().splitlines() if line.startswith("| holes")]
    return [(int(s), int(k), int(c), int(n), bits.strip()) for _, s, k, c, n, bits in rows]


def test_the_document_has_vectors() -> None:
    assert len(vectors()) >= 5 and any(inputs % 32 for _, inputs, *_ in vectors())


@pytest.mark.parametrize(("seed", "inputs", "count", "n", "meant"), vectors())
def test_vectors_of_the_document(seed: int, inputs: int, count: int, n: int, meant: str) -> None:
    row = SeededHoles.of(seed, (n + 1, inputs), count).unpack()[n, : len(meant)]
    assert "".join(map(str, row.int().tolist())) == meant
    assert [by_the_book(seed, n, k, inputs, count) for k in range(len(meant))] == row.int().tolist()


@pytest.mark.parametrize(("n", "k", "count"), SHAPES)
def test_pytorch_and_the_book_agree_and_every_row_keeps_as_many(n: int, k: int, count: int) -> None:
    mask = SeededHoles.of(11, (n, k), count).unpack()
    assert (mask.sum(1) == count).all()
    assert [by_the_book(11, n - 1, i, k, count) for i in range(k)] == mask[n - 1].int().tolist()


def test_places_rows_and_seeds_are_uncorrelated() -> None:
    """Each place of a word is kept as often, two of them as rarely together as in a draw without replacement."""
    n, k, count = 4096, 256, 160
    one, other = (SeededHoles.of(seed, (n, k), count).unpack().double() for seed in (1, 2))
    share = count / k
    sd = (share * (1 - share)) ** 0.5
    assert float((one.mean(0) - share).abs().max()) < 5 * sd / n**0.5
    z = (one - share) / sd
    places, rows = z.T @ z / n, z @ z.T / k
    own_word = torch.block_diag(*[torch.ones(32, 32, dtype=torch.bool)] * (k // 32)) & ~torch.eye(k, dtype=torch.bool)
    assert abs(float(places[own_word].mean()) + 1 / 31) < 0.003 and float(places[own_word].abs().max()) < 0.15
    apart = places[~own_word & ~torch.eye(k, dtype=torch.bool)]
    assert float(apart.abs().max()) < 6 / n**0.5
    assert float(rows[~torch.eye(n, dtype=torch.bool)].abs().max()) < 6.5 / k**0.5
    assert abs(float((z * (other - share) / sd).mean())) < 5 / (n * k) ** 0.5
    labels = SeededLabels.of(1, (n, k), 2).unpack().double() * 2 - 1  # of the same seed
    assert abs(float((z * labels).mean())) < 5 / (n * k) ** 0.5


def test_large_layers_are_unpacked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SeededHoles.of(3, (21, 70), 40)
    meant = whole.unpack()
    monkeypatch.setattr(holes, "_CHUNK", 3 * 70)
    assert torch.equal(whole.unpack(), meant)


# Operations.


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("n", "k", "count"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_moves_as_the_twin(n: int, k: int, count: int, dtype: torch.dtype) -> None:
    kept = SeededHoles.of(7, (n, k), count)
    values, w = torch.randn(kept.nnz, generator=seeded()).to(dtype), torch.randn(n, k, generator=seeded(1)).to(dtype)
    turned = torch.randn(k, n, generator=seeded(2)).to(dtype).T
    for there, weights in ((kept, (w, turned)), (kept.T, (w.T, turned.T))):
        assert torch.equal(unpack_values(values, there, backend="triton"), there.to_dense(values))
        for weight in weights:
            assert torch.equal(pack_values(weight, there, backend="triton"), there.from_dense(weight))


@pytest.mark.parametrize("transposed", [False, True])
def test_moves_are_each_others_gradients_and_compile_whole(transposed: bool) -> None:
    kept = SeededHoles.of(5, (9, 139), 80)
    kept = kept.T if transposed else kept
    v, w = integers(kept.nnz).requires_grad_(), integers(*kept.sizes, seed=1).requires_grad_()
    torch._dynamo.reset()
    for move in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)):
        dv = torch.autograd.grad(move(unpack_values)(v, kept), v, w.detach())[0]
        dw = torch.autograd.grad(move(pack_values)(w, kept), w, v.detach())[0]
        assert torch.equal(dv, kept.from_dense(w)) and torch.equal(dw, kept.to_dense(v))


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("alpha", [2, 8])
def test_every_operation_takes_them_as_it_takes_a_bitmap(alpha: int, backend: str) -> None:
    """Small integers, in which sums are exact; results, gradients and gradients' gradients, in both orientations."""
    n, k, count = 9, 139, 80
    labels, exists = SeededLabels.of(5, (n, k), alpha), SeededHoles.of(5, (n, k), count)
    packed, bitmap = PackedLabels.pack(labels.unpack(), alpha), fpe.kernels.Bitmap.pack(exists.unpack())
    dtype = torch.float64 if backend == "eager" else torch.float32

    def results(own: PackedLabels | SeededLabels, kept: fpe.kernels.Bitmap | SeededHoles) -> list[Tensor]:
        found = []
        for turn in (False, True):
            given, there = (own.T, kept.T) if turn else (own, kept)
            a, b = (n, k) if turn else (k, n)
            leaves = [integers(3, a), integers(3, alpha, a, seed=1), integers(3, alpha, b, seed=2)]
            x, z, dy, v = (t.to(dtype).requires_grad_() for t in (*leaves, integers(exists.nnz, seed=3)))
            y = split_matmul(x, v, given, alpha, kept=there, backend=backend)
            merged = merge_matmul(z, v, given, kept=there, backend=backend)
            dv = partition_grad(dy, x, given, kept=there, backend=backend)
            first = torch.autograd.grad([y.sum() * 2, merged.sum(), dv.sum()], (x, z, dy, v), create_graph=True)
            found += [y, merged, dv, *first]
            found += torch.autograd.grad(sum((g * g).sum() for g in (y, merged, dv)), (x, z, dy, v))
        return [r.detach() for r in found]

    assert all(torch.equal(a, b) for a, b in zip(results(labels, exists), results(packed, bitmap), strict=True))


def test_nothing_dense_is_held_between_forward_and_backward() -> None:
    labels, exists = SeededLabels.of(5, (9, 139), 2), SeededHoles.of(5, (9, 139), 80)
    x, v = integers(3, 139).requires_grad_(), integers(exists.nnz, seed=3).requires_grad_()
    held: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        split_matmul(x, v, labels, 2, kept=exists).sum().backward()
    assert sorted(held) == [x.numel(), v.numel()]


@pytest.mark.parametrize(("rows", "before"), [(1, []), (65, ["unpack_values"])])
def test_few_rows_are_multiplied_through_holes_and_many_by_a_decompressed_weight(
    rows: int, before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is decompressed is so by one kernel, and the twin is not asked."""
    labels, exists = SeededLabels.of(5, (9, 139), 2), SeededHoles.of(5, (9, 139), 80)
    moves: list[str] = []
    monkeypatch.setattr(kept, "_moved", lambda op, *rest, real=kept._moved: moves.append(op) or real(op, *rest))
    x, v = torch.randn(rows, 139, generator=seeded()), torch.randn(exists.nnz, generator=seeded(1))
    y = split_matmul(x, v, labels, 2, kept=exists, backend="triton")
    assert moves == before
    torch.testing.assert_close(y, split_matmul(x, exists.to_dense(v), labels, 2))


def test_auto_decompresses_what_has_holes_of_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a bitmap the cost model is asked; of a seed nothing has been measured yet."""
    allow(monkeypatch, kept.SPLIT, "triton")
    monkeypatch.setattr(kept, "device_of", lambda operand: KNOWN[80])
    monkeypatch.setattr(kept, "fastest_of_kept", lambda *call: kept.KEPT_VALUES)

    def reader(backend: str, bits: object) -> str | None:
        on_gpu: Any = SimpleNamespace(is_cuda=True)
        return kept._reader("split_matmul", (1, 9, 139, 2), 720, on_gpu, None, bits, False, backend)  # type: ignore[arg-type]

    assert [reader(backend, None) for backend in ("auto", "triton")] == [None, "triton"]
    assert reader("auto", torch.zeros(9, 5)) == "triton"


def test_opcheck() -> None:
    x, v = torch.randn(2, 40).requires_grad_(), torch.randn(9 * 22).requires_grad_()
    arguments = (x, v, None, None, None, None, [5, 0, 0, 22], None, None, 2, 9, False, "eager")
    torch.library.opcheck(torch.ops.fpe.kept_split.default, arguments)
    values, w, none = torch.randn(9 * 22).requires_grad_(), torch.randn(9, 40).requires_grad_(), (None, None, None)
    torch.library.opcheck(torch.ops.fpe.unpack_values.default, (values, *none, [5, 22], 9, 40, "eager"))
    torch.library.opcheck(torch.ops.fpe.pack_values.default, (w, *none, [5, 22], len(values), "eager"))


COMPILED = """
import json
import torch
from fpe.bench.lab import sass
from fpe.bench.lab.compile import catching, disassemble
from fpe.kernels import Bitmap, SeededHoles, SeededLabels
from fpe.kernels.bitmap.triton import pack_values_triton, unpack_values_triton
from fpe.kernels.partition.triton import split_matmul_triton

holes, found = SeededHoles.of(7, (64, 512), 412), []
x, values, w = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((16, 512), holes.nnz, (64, 512)))
kept, labels = Bitmap.pack(holes.unpack()).to("meta"), SeededLabels.of(7, (64, 512), 2)
for arch in (80, 90):
    with catching(arch, lambda kernel, key: False) as caught:
        unpack_values_triton(values, holes)
        pack_values_triton(w, holes)
        split_matmul_triton(x, values, labels, 2, kept=kept)
    for compiled, _ in caught:
        facts = sass.analyse(*disassemble(compiled.asm["cubin"]), set(), False)
        found.append((compiled.metadata.name, facts["spill_stores"] + facts["spill_loads"]))
print(json.dumps(found))
"""


def test_kernels_compile_without_spills() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    each = [["_holes_move", 0], ["_holes_move", 0], ["multiply_kept_rows", 0]]
    assert json.loads(done.stdout) == 2 * each


# Layers.


def _expanded(alpha: int = 2, seed: int = 7) -> tuple[nn.Sequential, nn.Sequential]:
    dense = mlp(48, 13, 6)
    return dense, fpe.expand(dense, alpha, structure="seeded", holes="seeded", seed=seed)


@pytest.mark.parametrize("alpha", [2, 4, 8])
def test_a_pair_stores_its_nonzeros_and_64_bytes(alpha: int) -> None:
    dense, wide = _expanded(alpha)
    first = wide[0]
    assert sum(p.numel() for n, p in wide.named_parameters() if n.endswith("weight")) == fpe.nonzeros(dense)
    assert fpe.nonzeros(wide) == fpe.nonzeros(dense) and isinstance(wide[2], nn.Linear)
    assert first.get_extra_state().nbytes == 64 and not first.topology_tensors()
    exists = SeededHoles.of(7, (13, 48), 48 - (alpha - 1) * 6)
    assert torch.equal(first.edge_weight, exists.from_dense(dense[0].weight))
    assert torch.equal(first.labels != fpe.kernels.HOLE, exists.unpack())
    x = torch.randn(5, 48, generator=seeded(4))
    again = fpe.restore(mlp(48, 13, 6), wide.state_dict())
    assert again[0].partition.kept == exists.per_row and torch.equal(again(x), wide(x))
    torch.testing.assert_close(fpe.to_dense(wide)(x), wide(x))


def test_a_training_step_is_that_of_the_dense_form() -> None:
    _, wide = _expanded()
    x = torch.randn(5, 48, generator=seeded(4))
    flat = fpe.to_dense(wide)
    for model in (wide, flat):
        model(x).square().sum().backward()
    meant = flat[0].weight.grad[wide[0].kept()]
    got = torch.zeros_like(flat[0].weight).flatten().index_put((wide[0].places(),), wide[0].edge_weight.grad)
    torch.testing.assert_close(got.view_as(flat[0].weight)[wide[0].kept()], meant)


def test_layers_of_a_gated_block_lose_the_excess_together() -> None:
    firsts, second = [torch.randn(8, 40) for _ in range(2)], torch.randn(5, 8)
    made = fpe.resparsify.plan(firsts, second, fpe.Partition.seeded(8, 40, 2, 3), "input", holes="seeded")
    assert [p.kept for p in made.firsts] == [37, 38] and made.nonzeros == 2 * 320 + 40


FITS = SeededHoles.of(1, (4, 6), 3)
BAD = (
    BadCall("count", lambda: SeededHoles.of(1, (4, 6), 7), ValueError, ("1 to 6", "7")),
    BadCall("none", lambda: SeededHoles.of(1, (4, 6), 0), ValueError, ("1 to 6", "0")),
    BadCall("seed", lambda: SeededHoles.of(-1, (4, 6), 2), ValueError, ("seed", "-1")),
    BadCall("shape", lambda: SeededHoles.of(1, (4, 6, 2), 2), ValueError, ("SeededHoles.of", "shape", "(4, 6, 2)")),  # type: ignore[arg-type]
    BadCall("bool", lambda: SeededHoles.of(1, (4, 6), True), ValueError, ("1 to 6", "True")),
    BadCall(
        "other-seed",
        lambda: split_matmul(torch.ones(1, 6), torch.ones(12), SeededLabels.of(2, (4, 6), 2), 2, kept=FITS),
        ValueError,
        ("split_matmul", "holes of seed 1"),
    ),
    BadCall(
        "values",
        lambda: split_matmul(torch.ones(1, 6), torch.ones(13), SeededLabels.of(1, (4, 6), 2), 2, kept=FITS),
        ValueError,
        ("split_matmul", "12", "13"),
    ),
    BadCall("move-values", lambda: unpack_values(torch.ones(13), FITS), ValueError, ("unpack_values", "12", "13")),
    BadCall("move-shape", lambda: pack_values(torch.ones(4, 6), FITS.T), ValueError, ("pack_values", "[6, 4]")),
    BadCall(
        "move-seed",
        lambda: unpack_values(torch.ones(12), FITS._replace(seed=-1)),
        ValueError,
        ("unpack_values", "seed", "-1"),
    ),
    BadCall(
        "policy",
        lambda: fpe.expand(mlp(8, 6, 4), structure="seeded", resparsify="magnitude", holes="seeded"),
        ValueError,
        ("holes='seeded'", "'magnitude'"),
    ),
    BadCall("structure", lambda: fpe.expand(mlp(8, 6, 4), holes="seeded"), ValueError, ("holes='seeded'", "'random'")),
    BadCall("unknown", lambda: fpe.expand(mlp(8, 6, 4), holes="some"), ValueError, ("holes", "'some'")),  # type: ignore[arg-type]
    BadCall(
        "plan",
        lambda: fpe.resparsify.plan(
            torch.ones(4, 6), torch.ones(2, 4), fpe.Partition.random(4, 6, 2), "input", holes="seeded"
        ),
        ValueError,
        ("'seeded'", "'random'"),
    ),
    BadCall(
        "kept-alone",
        lambda: fpe.Partition(torch.zeros(2, 4, dtype=torch.uint8), 2, kept=2),
        ValueError,
        ("kept needs a seed", "2"),
    ),
    BadCall(
        "rewiring",
        lambda: fpe.Rewiring(made := _expanded()[1], torch.optim.SGD(made.parameters(), lr=0.1)),
        ValueError,
        ("Rewiring", "'0'", "holes='magnitude'"),
    ),
    BadCall(
        "labels",
        lambda: fpe.Partition(fpe.Partition.seeded(4, 6, 2, 1).labels, 2, "seeded", seed=1, kept=3).validate(),
        ValueError,
        ("seed 1",),
    ),
)


@pytest.mark.parametrize("case", BAD, ids=readable_id)
def test_bad_calls(case: BadCall) -> None:
    case.check()
