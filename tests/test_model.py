"""The cost model: its arithmetic by hand, its choices, and its crossovers by brute force."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import MEASURED_ROOF, ROOT, BadCall, readable_id

from fpe.bench.costs import verdict
from fpe.bench.results import COMMITTED, Results
from fpe.kernels import model, roofs
from fpe.kernels.gpus import ARCHITECTURES
from fpe.kernels.model import Sizes, best, candidates, crossover, layer_candidates
from fpe.kernels.partition.config import DIRECT_ROWS
from fpe.kernels.roofs import PUBLISHED, Roof, Share
from fpe.kernels.structures import STRUCTURES

FLAT = Roof(
    "flat", 80, 1e12, {"bf16": 1e14, "fp32": 1e13}, 1e6, 1e15, 1e-6, "measured", Share(1, 1),
    {name: Share(1.0, 1.0) for name in roofs.ASSUMED},
)  # fmt: skip
"""A device of round numbers on which everything reaches all of it: times can be worked out in one's head."""


def at(name: str, op: str = "split_matmul", structure: str = "random", m: int = 1, alpha: int = 2, **options: object):
    roof, transposed = options.pop("roof", FLAT), options.pop("transposed", False)
    sizes = Sizes(m, alpha=alpha, structure=structure, **{"n": 1024, "k": 2048, **options})  # type: ignore[arg-type]
    return next(c for c in candidates(op, sizes, roof, transposed=transposed) if c.name == name)  # type: ignore[arg-type]


N, K = 1024, 2048
WEIGHTS = 2 * N * K


@pytest.mark.parametrize(
    ("op", "name", "bytes_", "flops"),
    [
        ("split_matmul", "parent", WEIGHTS + 2 * 8 * (N + K), 2 * 8 * N * K),
        ("split_matmul", "wide dense", 4 * WEIGHTS + 2 * 8 * (4 * N + K), 8 * 8 * N * K),
        ("split_matmul", "packed labels", WEIGHTS + N * K // 4 + 2 * 8 * (4 * N + K), 8 * 8 * N * K),
        ("merge_matmul", "packed labels", WEIGHTS + N * K // 4 + 2 * 8 * (N + 4 * K), 8 * 8 * N * K),
        ("partition_grad", "packed labels", WEIGHTS + N * K // 4 + 2 * 8 * (4 * N + K), 8 * 8 * N * K),
        # The eager twin reads values and labels of a byte, writes the wide weight and reads it again.
        ("split_matmul", "masked dense", WEIGHTS + N * K + 8 * WEIGHTS + 2 * 8 * (4 * N + K), 8 * 8 * N * K),
    ],
)
def test_bytes_and_flops_are_those_of_the_formats(op: str, name: str, bytes_: int, flops: int) -> None:
    found = at(name, op, m=8, alpha=4)
    assert (found.bytes, found.flops) == (bytes_, flops)


def test_blocks_do_the_parents_arithmetic() -> None:
    found = at("blocks", structure="block", m=64, alpha=4)
    tiles = (N // 64) * (K // 64)
    index = 4 * tiles + 4 * (4 * (N // 64) + 1)
    assert found.flops == 2 * 64 * N * K
    assert found.bytes == WEIGHTS + index + 2 * 64 * (4 * N + K)


def test_time_is_the_largest_part_and_the_launches() -> None:
    small, large = at("parent", m=1), at("parent", m=4096)
    assert small.seconds == pytest.approx((WEIGHTS + 2 * (N + K)) / 1e12 + 1e-6) and small.limited_by == "memory"
    assert large.seconds == pytest.approx(2 * 4096 * N * K / 1e14 + 1e-6) and large.limited_by == "arithmetic"
    assert at("masked dense").seconds == pytest.approx(at("masked dense").bytes / 1e12 + 2e-6)
    assert at("parent", n=4, k=4).limited_by == "launch"
    slow = replace(FLAT, integer=1e11)
    unpacked = at("packed labels", m=129, roof=slow)
    assert unpacked.limited_by == "unpacking"
    assert unpacked.seconds == pytest.approx(2 * N * K * 2 * model.ASSUMED_UNPACKING["packed labels"] / 1e11 + 1e-6)
    assert at("parent", m=129, roof=slow).limited_by != "unpacking"


def test_few_rows_unpack_as_the_binaries_do() -> None:
    slow = replace(FLAT, integer=1e9)

    def slots(m: int, alpha: int = 2, op: str = "split_matmul", **options: object) -> float:
        found = at("packed labels", op=op, m=m, alpha=alpha, roof=slow, **options)
        return (found.seconds - slow.launch_seconds) * slow.integer / (1024 * 2048)

    table = model.UNPACKING["split_matmul", False]
    assert slots(1) == slots(16) == pytest.approx(table[2][0])
    assert slots(32) == pytest.approx(table[2][1]) and slots(64) == pytest.approx(2 * table[2][1])
    assert slots(16, 5) == pytest.approx(table[8][0]) and slots(16, 16) == pytest.approx(2 * table[8][0])
    assert slots(16, transposed=True) == pytest.approx(model.UNPACKING["split_matmul", True][2][0])
    assert slots(16, op="merge_matmul") == pytest.approx(model.UNPACKING["merge_matmul", False][2][0])
    tiled = 2 * model.ASSUMED_UNPACKING["packed labels"]
    assert slots(65) == pytest.approx(tiled) == slots(16, dtype="fp32")
    assert slots(16, k=2047) * 2048 / 2047 == pytest.approx(tiled) == slots(16, n=1023, transposed=True) * 1024 / 1023
    (forward,), (dx,) = (layer_candidates((name,), Sizes(16, 1024, 2048), slow) for name in ("forward", "dX"))
    forward, dx = (next(c for c in found if c.name == "packed labels") for found in (forward, dx))
    assert dx.seconds > forward.seconds


def test_slots_of_few_rows_are_those_of_the_committed_binaries() -> None:
    assert model.DECODE_ROWS == DIRECT_ROWS
    rows = {
        (row["op"], row["alpha"], row["case"].rsplit("-m", 1)[-1]): row
        for row in Results.read(COMMITTED / "lab/compile.jsonl").rows
        if row["arch"] == 90
        and row["dtype"] == "bf16"
        and row["kernel"].startswith("multiply_")
        and "seeded" not in row["case"]
    }
    for (op, transposed), table in model.UNPACKING.items():
        name = op.removesuffix("_matmul") + ("_t" if transposed else "")
        for alpha, slots in table.items():
            for m, found in zip((16, 32), slots, strict=True):
                row = rows.get((name, alpha, str(m))) or rows[name, alpha, "16"]  # where one binary serves both
                tiles = math.ceil(m / int(row["tile"].split("x")[0]))
                counted = tiles * max(row["instructions_per_weight"] / 2, row["integer_per_weight"])
                assert found == pytest.approx(counted, rel=0.05), (name, alpha, m)


def test_slots_of_kept_values_are_those_of_the_committed_binaries() -> None:
    rows = {
        (row["op"], row["alpha"], int(row["case"].rpartition("-m")[2])): row
        for row in Results.read(COMMITTED / "lab/bitmap.jsonl").rows
        if row["arch"] == 90 and row["dtype"] == "bf16" and row["matrix"]
        if "seeded" not in row["case"]
    }
    for (op, transposed), table in model.KEPT_UNPACKING.items():
        name = f"kept_{op.removesuffix('_matmul')}{'_t' * transposed}"
        for alpha, (few, many) in table.items():
            for m, slots in ((16, few), (64, many)):
                row = rows[name, alpha, m if alpha <= 2 else 16]  # of more children 64 rows are tiles of fewer
                counted = max(row["instructions_per_weight"] / 2, row["integer_per_weight"])
                assert slots == pytest.approx(counted, rel=0.01), (name, alpha, m)
    of_two, of_eight = (model.KEPT_UNPACKING["split_matmul", False][alpha] for alpha in (2, 8))
    of_rows = [model.kept_unpacking("split_matmul", False, 2, m) for m in (32, 33, 64)]
    assert of_rows == [of_two[0], 2 * of_two[1], 2 * of_two[1]]
    assert model.kept_unpacking("split_matmul", False, 8, 64) == 4 * of_eight[1]


PLACES = N * K * (1 + 1 / 64) / 8


@pytest.mark.parametrize("op", ["split_matmul", "merge_matmul", "partition_grad"])
def test_kept_values_are_read_or_decompressed_in_the_bytes_of_their_format(op: str) -> None:
    sides = 2 * 8 * (2 * (K if op == "merge_matmul" else N) + (N if op == "merge_matmul" else K))
    fused = at("kept values", op, m=8, kept=0.25)
    assert fused.bytes == WEIGHTS / 4 + PLACES + N * K / 8 + sides and fused.flops == 2 * 2 * 8 * N * K
    first, inner = WEIGHTS / 4 + PLACES + WEIGHTS, at("packed labels", op, m=8)
    found = at("decompressed", op, m=8, kept=0.25)
    assert found.bytes == first + inner.bytes
    assert found.seconds == pytest.approx(first / 1e12 + 1e-6 + inner.seconds)
    one = at("decompressed", op, m=8, kept=0.25, alpha=1)  # one child is a dense matmul
    assert one.seconds == pytest.approx(first / 1e12 + 1e-6 + at("parent", op, m=8, alpha=1).seconds)
    assert at("kept values", op, m=8, kept=0.25, alpha=1).bytes == WEIGHTS / 4 + PLACES + 2 * 8 * (N + K)


def test_the_way_of_kept_values_follows_rows_architecture_and_share() -> None:
    def first(gpu: str, m: int, kept: float = 0.5, alpha: int = 1) -> str:
        return best(candidates("split_matmul", Sizes(m, 4096, 14336, alpha, kept=kept), PUBLISHED[gpu])).name

    assert [first("4090", m) for m in (1, 64, 65)] == ["kept values", "kept values", "decompressed"]
    assert first("b200", 1) == "decompressed"
    assert "fence" in at("kept values", kept=0.5, roof=PUBLISHED["b200"]).reason_not
    assert "up to 64 rows, got 65" in at("kept values", m=65, kept=0.5).reason_not
    for gpu in PUBLISHED:
        for m in (1, 16, 64, 1024, 8192):
            assert first(gpu, m, 0.25, 4) != "masked dense"


@pytest.mark.parametrize("bad", [
    BadCall("share", lambda: at("parent", kept=1.5), ValueError, ("kept", "0 to 1", "1.5")),
    BadCall("structure", lambda: at("parent", structure="2:4", kept=0.5), ValueError, ("'random'", "'2:4'")),
    BadCall("parent", lambda: verdict.Layer(alpha=1), ValueError, ("one child", "alpha from 2")),
], ids=readable_id)  # fmt: skip
def test_kept_values_that_cannot_be_are_refused(bad: BadCall) -> None:
    bad.check()


def test_shares_reach_and_sparse_rates_scale_the_time() -> None:
    half = replace(FLAT, shares={**FLAT.shares, "parent": Share(0.5, 0.25)}, launch_seconds=1e-12)
    whole = replace(FLAT, launch_seconds=1e-12)
    assert at("parent", roof=half).seconds == pytest.approx(2 * at("parent", roof=whole).seconds)
    assert at("parent", m=4096, roof=half).seconds == pytest.approx(4 * at("parent", m=4096, roof=whole).seconds)
    reached = replace(whole, reach=Share(0.8, 1.0))
    assert at("parent", roof=reached).seconds == pytest.approx(at("parent", roof=whole).seconds / 0.8)
    dense, sparse = (at(n, structure="2:4", m=8192, roof=whole) for n in ("wide dense", "sparse tensor cores"))
    assert dense.seconds == pytest.approx(2 * sparse.seconds)
    hopper = at("sparse tensor cores", structure="2:4", m=8192, roof=replace(whole, arch=90))
    assert hopper.seconds == pytest.approx(sparse.seconds / ARCHITECTURES[90].warp_mma)


def test_memory_bound_split_costs_what_the_format_says() -> None:
    """6 % more than the parent at 16 bits and alpha = 2, 12 % at 4, and near 1.88 and 3.56 times less than wide."""
    for alpha, over, under in ((2, 1.0625, 1.88), (4, 1.125, 3.56), (8, 1.1875, 6.74)):
        sizes = {"n": 14336, "k": 4096, "alpha": alpha, "roof": replace(FLAT, launch_seconds=1e-12)}
        ours, parent, wide = (at(name, **sizes).seconds for name in ("packed labels", "parent", "wide dense"))
        assert ours / parent == pytest.approx(over, rel=2e-3) and wide / ours == pytest.approx(under, rel=3e-3)


# Choices.


def test_yardsticks_are_never_chosen() -> None:
    for structure in STRUCTURES:
        for m in (1, 100, 10_000):
            found = candidates("split_matmul", Sizes(m, N, K, structure=structure), FLAT)
            winner = best(found)
            assert winner.name not in model.YARDSTICKS and not winner.reason_not
            assert winner.seconds == min(c.seconds for c in found if not c.reason_not)
    with pytest.raises(ValueError, match="can run"):
        best([c for c in found if c.name in model.YARDSTICKS])


@pytest.mark.parametrize(
    ("options", "name", "why"),
    [
        ({}, "sparse tensor cores", "a split of structure 2:4 alone"),
        ({"structure": "seeded"}, "sparse tensor cores", "only if it is asked for by name"),
        ({"structure": "seeded", "alpha": 4}, "sparse tensor cores", "two children of a seed, got 4"),
        ({"structure": "seeded", "op": "merge_matmul"}, "sparse tensor cores", "stored labels"),
        ({"structure": "seeded"}, "torch.sparse", "stored labels"),
        ({"structure": "2:4"}, "sparse tensor cores", ""),
        ({"structure": "2:4"}, "torch.sparse", ""),
        ({"structure": "2:4", "n": 1000}, "torch.sparse", "multiples of 16"),
        ({"structure": "2:4", "n": 1000}, "sparse tensor cores", ""),
        ({"structure": "2:4", "dtype": "fp32"}, "sparse tensor cores", "bf16 and fp16"),
        ({"op": "merge_matmul"}, "sparse tensor cores", ""),
        ({"op": "merge_matmul", "alpha": 4}, "sparse tensor cores", ""),
        ({"op": "merge_matmul", "alpha": 4}, "torch.sparse", "alpha = 2"),
        ({"op": "merge_matmul", "alpha": 3}, "sparse tensor cores", "alpha = 2 or 4"),
        ({"op": "partition_grad", "structure": "2:4"}, "sparse tensor cores", "dW"),
        ({"structure": "block", "block": (64, 48)}, "blocks", "sides of"),
        ({"structure": "block", "block": (16, 128)}, "blocks", ""),
        ({"roof": replace(FLAT, arch=75)}, "packed labels", "compute capability 8.0"),
    ],
    ids=str,
)
def test_reasons_against_a_candidate(options: dict, name: str, why: str) -> None:
    found = at(name, **options)
    assert why in found.reason_not and bool(why) == bool(found.reason_not)


def test_small_blocks_are_assumed_slower() -> None:
    times = [at("blocks", structure="block", m=8192, block=(side, 64)).seconds for side in (16, 32, 64)]
    assert times[0] > times[1] > times[2]


@pytest.mark.parametrize("passes", [model.INFERENCE, model.TRAINING], ids=len)
@pytest.mark.parametrize(("structure", "alpha"), [("random", 2), ("2:4", 2), ("block", 4), ("random", 4)])
@pytest.mark.parametrize("tolerance", [0.1, 0.3, 1.5])
def test_crossover_is_the_last_batch_of_the_first_stretch(
    passes: tuple, structure: str, alpha: int, tolerance: float
) -> None:
    layer, roof = Sizes(1, 512, 1024, alpha, structure), PUBLISHED["h200"]

    def ratio(m: int) -> float:
        found = layer_candidates(passes, replace(layer, m=m), roof)
        return model.seconds_of(found) / model.seconds_of(found, "parent")

    first = next((m for m in range(1, 3000) if ratio(m) > 1 + tolerance), None)
    expected = model.MAX_ROWS if first is None else first - 1
    found = crossover(passes, layer, roof, tolerance)
    assert found == expected or (first is None and found >= 2999)


def test_backward_passes_see_the_transposed_layer() -> None:
    n, k, m, block = 40, 256, 7, (16, 128)
    passes = layer_candidates(model.TRAINING, Sizes(m, n, k, structure="block", block=block), FLAT)
    forward, dx, dw = (next(c for c in found if c.name == "blocks").bytes for found in passes)
    traffic = 2 * m * (2 * n + k)  # the children's side and the inputs, whichever of them is read
    assert forward == dw == model.bytes_by_format(n, k, 2, 2, block)["blocks"] + traffic
    assert dx == model.bytes_by_format(k, n, 2, 2, (128, 16))["blocks"] + traffic != forward


def test_blocks_hold_longer_than_random_labels() -> None:
    for roof in PUBLISHED.values():
        held = {s: crossover(model.INFERENCE, Sizes(1, 4096, 14336, structure=s), roof) for s in ("random", "block")}
        assert held["block"] > held["random"], roof.name


# Roofs.


def test_published_figures_hang_together() -> None:
    for roof in PUBLISHED.values():
        assert roof.source == "published" and roof.reach == roofs.ASSUMED_REACH
        assert "published" in roof.basis and "assumed" in roof.basis
        balance = roof.flops["bf16"] / roof.bandwidth  # FLOPs for a byte: tens to hundreds on every such device
        assert 50 < balance < 500 and roof.flops["fp16"] == roof.flops["bf16"] >= 1.9 * roof.flops["tf32"]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("h200", "H200"), ("NVIDIA H200", "H200"), ("NVIDIA L4", "L4"), ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"), ("NVIDIA A100-SXM4-40GB", "A100 40GB SXM"),
        ("NVIDIA RTX A6000", "RTX A6000"), ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)  # fmt: skip
def test_devices_are_recognised_by_their_own_names(given: str, name: str) -> None:
    assert roofs.roof_named(given).name == name


@pytest.mark.parametrize(
    "given", ["NVIDIA Something 40", "NVIDIA GH200", "NVIDIA GeForce RTX 4090 Laptop GPU", "A1000", ""]
)
def test_devices_that_are_not_in_the_table_are_not_guessed(given: str) -> None:
    with pytest.raises(ValueError, match="GPU must be one of"):
        roofs.roof_named(given)
    with pytest.raises(ValueError, match="GPU must be one of"):
        roofs.roof_named(given, 75)
    stand_in = roofs.roof_named(given, 103)
    assert (stand_in.name, stand_in.arch) == (f"{given}, taken for a B200", 100) and stand_in.flops == PUBLISHED[
        "b200"
    ].flops


def write(path: Path, text: object) -> Path:
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def test_a_measured_roof_replaces_what_it_measured(tmp_path: Path) -> None:
    roof = verdict.find_roof(str(write(tmp_path / "r.json", MEASURED_ROOF)))
    assert roof.reach == (1, 1) and roof.source == "measured" and roof.shares["blocks"] == Share(0.8, 0.7)
    assert roof.shares["parent"] == roofs.ASSUMED["parent"] and "partly assumed" in roof.basis


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"name": "te', "expected a roof in JSON"),
        ("[1]", "got list"),
        ({"name": "x"}, "missing: ['arch'"),
        ({**MEASURED_ROOF, "speed": 1}, "unknown: ['speed']"),
        ({**MEASURED_ROOF, "bandwidth": -1}, "bandwidth must be a positive number, got -1"),
        ({**MEASURED_ROOF, "bandwidth": "fast"}, "got 'fast'"),
        ({**MEASURED_ROOF, "flops": {"int3": 1}}, "unknown ['int3']"),
        ({**MEASURED_ROOF, "shares": {"magic": [1, 1]}}, "unknown ['magic']"),
    ],
)
def test_bad_roofs_are_refused(tmp_path: Path, text: object, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        Roof.read(write(tmp_path / "r.json", text))
    assert says in str(caught.value) and "r.json" in str(caught.value)


BAD = (
    BadCall("op", lambda: at("parent", "matmul"), ValueError, ("op must be one of", "'matmul'")),
    BadCall("structure", lambda: at("parent", structure="3:4"), ValueError, ("structure", "'3:4'")),
    BadCall("dtype", lambda: at("parent", dtype="int8"), ValueError, ("dtype", "'int8'")),
    BadCall("no rate", lambda: at("parent", dtype="tf32"), ValueError, ("flat", "tf32")),
    BadCall("rows", lambda: at("parent", m=0), ValueError, ("m must be a positive integer", "0")),
    BadCall("bool", lambda: at("parent", n=True), ValueError, ("n must be", "True")),
    BadCall("block", lambda: at("blocks", structure="block", block=(0, 4)), ValueError, ("block", "0")),
    BadCall("2:4", lambda: at("parent", structure="2:4", alpha=4), ValueError, ("alpha = 2", "4")),
    BadCall("gpu", lambda: roofs.roof_named("6090"), ValueError, ("h200", "'6090'")),
)


@pytest.mark.parametrize("bad", BAD, ids=readable_id)
def test_bad_calls(bad: BadCall) -> None:
    bad.check()


def test_the_model_is_pure() -> None:
    """Neither torch nor Triton is needed to import it."""
    code = (
        "import sys, types; sys.modules['torch'] = sys.modules['triton'] = None\n"
        f"bare = sys.modules['bare'] = types.ModuleType('bare'); bare.__path__ = [{str(ROOT / 'kernels')!r}]\n"
        "from bare import model, roofs; print(roofs.roof_named('h200').name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "H200", done.stderr
