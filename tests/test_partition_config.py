"""Which configurations the partition kernels take: the rule, what fits a device, and what is refused."""

from dataclasses import replace
from itertools import product
from math import ceil

import pytest

from fpe.kernels.device import KNOWN
from fpe.kernels.partition.config import (
    DIRECT_ROWS,
    MAX_ALPHA,
    Config,
    Problem,
    columns_of,
    shared_bytes,
    warps_of,
)
from fpe.kernels.tables import choose


@pytest.mark.parametrize("arch", KNOWN)
@pytest.mark.parametrize("op", ["split_matmul", "merge_matmul", "partition_grad"])
def test_the_rule_always_chooses_what_can_run(arch: int, op: str) -> None:
    sizes = ((1, 1), (100, 784), (4096, 14336))
    kinds = ((2, True), (2, False), (4, False))
    every = product((1, 16, 17, 64, 1000, 8192), sizes, (False, True), range(1, MAX_ALPHA + 1), kinds)
    for m, (n, k), transposed, alpha, (itemsize, pairs) in every:
        problem = Problem(op, m, n, k, transposed, alpha, itemsize, pairs)
        config = choose(problem, KNOWN[arch])
        assert problem.fits(config, KNOWN[arch]), (problem, config)
        assert config.direct == (pairs and m <= DIRECT_ROWS and op != "partition_grad")


@pytest.mark.parametrize("pairs", [False, True])
def test_the_rule_fills_the_device_for_one_token(pairs: bool) -> None:
    for transposed in (False, True):
        problem = Problem("split_matmul", 1, 4096, 4096, transposed, 2, 2, pairs)
        config = choose(problem, KNOWN[90])
        tiles = 4096 // (config.block_k if transposed else config.block_n)
        assert config.block_m == (8 if pairs else 16) and tiles * config.split >= 128
    assert choose(replace(problem, m=8192), KNOWN[90]).split == 1


def test_few_configurations_serve_all_batch_sizes() -> None:
    for pairs in (False, True):
        met = {choose(Problem("split_matmul", m, 14336, 4096, False, 2, 2, pairs), KNOWN[90]) for m in range(1, 8193)}
        assert len(met) <= 8


@pytest.mark.parametrize(
    "change",
    [{"block_m": 8}, {"block_n": 48}, {"block_k": 8}, {"num_stages": 0}, {"split": 3}, {"num_stages": 99}],
    ids=str,
)
def test_an_impossible_configuration_is_invalid(change: dict[str, int]) -> None:
    good, problem = Config(64, 64, 64, 2, 8, 4, 4), Problem("split_matmul", 64, 4096, 4096, False, 2, 2)
    assert problem.fits(good, KNOWN[80])
    assert not problem.fits(replace(good, **change), KNOWN[80])


@pytest.mark.parametrize(
    "change",
    [{"block_m": 4}, {"block_n": 32}, {"block_k": 64}, {"num_warps": 2}, {"block_n": 128, "block_m": 64}],
    ids=str,
)
def test_an_impossible_direct_configuration_is_invalid(change: dict[str, int]) -> None:
    good = Config(32, 64, 128, 2, 8, 4, 1, direct=True)
    problem = Problem("split_matmul", 64, 4096, 4096, False, 4, 2, pairs=True)
    assert problem.fits(good, KNOWN[80]) and shared_bytes(problem, good, KNOWN[80]) == 0
    assert not problem.fits(replace(good, **change), KNOWN[80])
    assert not replace(problem, pairs=False).fits(good, KNOWN[80])


@pytest.mark.parametrize("transposed", [False, True])
def test_warps_that_share_a_reduction_add_in_shared_memory(transposed: bool) -> None:
    problem = Problem("split_matmul", 16, 4096, 4096, transposed, 2, 2, pairs=True)
    tile = {"block_n": 128, "block_k": 128} if transposed else {"block_n": 32, "block_k": 512}
    config = Config(16, **tile, split=1, group=8, num_warps=8, num_stages=1, direct=True)
    assert warps_of(config, transposed, 2) == (4, 2) and problem.fits(config, KNOWN[90])
    assert shared_bytes(problem, config, KNOWN[90]) == 8 * 2 * 512  # 8 warps, two tiles of 8 rows


def test_sums_of_eight_children_leave_a_warp_half_as_many_columns_of_the_transpose() -> None:
    """One pass of 16 rows, where their labels are stored; a merge has one sum for all, and few rows need no more."""
    problem = Problem("split_matmul", 16, 14336, 4096, True, 8, 2, pairs=True)

    def taken(**change: object) -> tuple[int, int]:
        of = replace(problem, **change)  # type: ignore[arg-type]
        config = choose(of, KNOWN[90])
        return config.block_m, columns_of(config.block_m, of.sums)

    assert taken() == taken(m=64) == taken(alpha=5) == (16, 32)
    assert taken(m=8) == taken(seeded=True) == (8, 64) and taken(alpha=4) == (16, 64)
    assert taken(op="merge_matmul") == (16, 64)
    good = choose(problem, KNOWN[90])
    assert problem.fits(good, KNOWN[90]) and not replace(problem, seeded=True).fits(good, KNOWN[90])
    assert not problem.fits(replace(good, block_n=good.block_n // 2), KNOWN[90])


LARGE = ((14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (5120, 13824), (3584, 18944), (49152, 12288))
"""Layers of language models whose weights have 64 MB and more."""


@pytest.mark.parametrize("alpha", [2, 4, 8])
@pytest.mark.parametrize("op", ["split_matmul", "merge_matmul"])
def test_partial_sums_of_large_layers_stay_few_and_the_device_full(op: str, alpha: int) -> None:
    for (n, k), m, transposed, arch in product(LARGE, (1, 8, 16, 32, 64), (False, True), KNOWN):
        problem = Problem(op, m, n, k, transposed, alpha, 2, pairs=True)
        config, device = choose(problem, KNOWN[arch]), KNOWN[arch]
        outputs, out = (k, config.block_k) if transposed else (n, config.block_n)
        sums = 1 if op == "merge_matmul" else alpha
        stored = 4 * m * sums * outputs * config.split if config.split > 1 else 0
        assert stored <= (0.02 if m <= 16 else 0.04) * 2 * n * k, (problem, config)
        warps = ceil(m / config.block_m) * ceil(outputs / out) * config.split * config.num_warps
        assert warps >= 4 * device.sms, (problem, config)


def test_shared_memory_of_the_tiles() -> None:
    config = Config(64, 32, 128, 1, 8, 4, 4)
    split = Problem("split_matmul", 64, 4096, 4096, False, 4, 2)
    merge, grad = replace(split, op="merge_matmul"), replace(split, op="partition_grad")
    for arch, buffers in ((80, 3), (90, 4)):
        w, x, device = 32 * 128, 64 * 128, KNOWN[arch]
        assert shared_bytes(split, config, device) == (buffers * (w + x) + 2 * w) * 2
        assert shared_bytes(merge, config, device) == (buffers * (w + 4 * x) + 2 * w) * 2
        assert shared_bytes(grad, config, device) == buffers * (4 * 64 * 32 + 64 * 128) * 2
