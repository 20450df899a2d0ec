"""Labels of a seed: the function as it is written down, its statistics, and every operation on it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support import BadCall, integers, mlp, readable_id, seeded
from torch import Tensor, nn

import fpe
from fpe.kernels import (
    Bitmap,
    PackedLabels,
    SeededLabels,
    UnsupportedError,
    expanded_mlp,
    merge_matmul,
    partition_grad,
    split_matmul,
)
from fpe.kernels.partition.seeded import beside, signed
from fpe.layers import ExpandedLinear

ALPHAS = (2, 4, 8)
SPECIFICATION = Path(__file__).resolve().parents[1] / "docs/seeded.md"


def by_the_book(seed: int, n: int, k: int, alpha: int) -> int:
    """One label in plain integers, line by line as ``docs/seeded.md`` has it."""

    def mixed(x: int) -> int:
        x %= 2**32
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    digits = alpha.bit_length() - 1
    c = k // 8
    hashed = mixed(mixed(seed + 0x9E3779B9) + n // 2 * 0x9E3779B1 + (c // 16 * 4 + c % 4) * 0x85EBCA77)
    first = 8 * digits * (k % 8 // alpha) + 2 * (c // 4 % 4) + n % 2
    rank = sum((hashed >> first + 8 * d & 1) << d for d in range(digits))
    return (k ^ rank) % alpha


def in_numpy(seed: int, rows: int, columns: int, alpha: int) -> np.ndarray:
    """All labels in NumPy's 32-bit arithmetic."""

    def mixed(x: np.ndarray) -> np.ndarray:
        x = (x ^ x >> np.uint32(16)) * np.uint32(0x85EBCA6B)
        x = (x ^ x >> np.uint32(13)) * np.uint32(0xC2B2AE35)
        return x ^ x >> np.uint32(16)

    n, k = np.arange(rows, dtype=np.uint32)[:, None], np.arange(columns, dtype=np.uint32)
    digits, c = alpha.bit_length() - 1, k // np.uint32(8)
    key = mixed(np.array([(seed + 0x9E3779B9) % 2**32], np.uint32))
    words = c // np.uint32(16) * np.uint32(4) + c % np.uint32(4)
    hashed = mixed(key + n // np.uint32(2) * np.uint32(0x9E3779B1) + words * np.uint32(0x85EBCA77))
    first = np.uint32(8 * digits) * (k % 8 // np.uint32(alpha)) + 2 * (c // 4 % 4) + n % 2
    rank = np.zeros((rows, columns), np.uint32)
    for digit in range(digits):
        rank |= (hashed >> (first + np.uint32(8 * digit)) & np.uint32(1)) << np.uint32(digit)
    return ((k ^ rank) % alpha).astype(np.uint8)


def vectors(kind: str = "vector") -> list[tuple[int, int, int, int, str]]:
    """Seed, alpha, row, first column and labels of the test vectors of a kind in the document."""
    rows = [line.split("|")[1:-1] for line in SPECIFICATION.read_text().splitlines() if line.startswith(f"| {kind}")]
    return [(int(s), int(a), int(n), int(k), labels.strip()) for _, s, a, n, k, labels in rows]


def test_the_document_has_vectors() -> None:
    assert len(vectors()) >= 9 and {alpha for _, alpha, *_ in vectors()} == set(ALPHAS)
    assert len(vectors("turned")) >= 3 and {alpha for _, alpha, *_ in vectors("turned")} == set(ALPHAS)


@pytest.mark.parametrize(("seed", "alpha", "n", "k", "meant"), vectors())
def test_vectors_of_the_document(seed: int, alpha: int, n: int, k: int, meant: str) -> None:
    labels = SeededLabels.of(seed, (1, len(meant)), alpha, (n, k)).unpack()
    assert "".join(map(str, labels[0].tolist())) == meant
    assert [by_the_book(seed, n, k + i, alpha) for i in range(len(meant))] == labels[0].tolist()


@pytest.mark.parametrize(("seed", "alpha", "n", "k", "meant"), vectors("turned"))
def test_vectors_of_the_second_version(seed: int, alpha: int, n: int, k: int, meant: str) -> None:
    labels = fpe.Partition.seeded(n + 1, k + len(meant), alpha, seed, turned=True).validate().labels[n, k:]
    assert "".join(map(str, labels.tolist())) == meant
    assert [by_the_book(seed, k + i, n, alpha) for i in range(len(meant))] == labels.tolist()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_pytorch_numpy_and_the_book_agree(seed: int, alpha: int) -> None:
    labels = SeededLabels.of(seed, (9, 531), alpha).unpack()
    assert np.array_equal(labels.numpy(), in_numpy(seed, 9, 531, alpha))
    some = [(0, 0), (1, 127), (3, 128), (8, 530)]
    assert [int(labels[at]) for at in some] == [by_the_book(seed, *at, alpha) for at in some]


def test_large_layers_are_unpacked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SeededLabels.of(3, (21, 70), 4, (3, 9))
    meant = whole.unpack()
    monkeypatch.setattr("fpe.kernels.partition.seeded._CHUNK", 3 * 70)
    assert torch.equal(whole.unpack(), meant)


# What a division must be.


@pytest.mark.parametrize("alpha", ALPHAS)
def test_every_group_of_inputs_gives_each_child_one(alpha: int) -> None:
    labels = SeededLabels.of(11, (64, 512), alpha).unpack()
    groups = labels.view(64, -1, alpha).sort(-1).values
    assert torch.equal(groups, torch.arange(alpha, dtype=torch.uint8).expand_as(groups))
    if alpha == 2:  # so it is 2:4 too
        fpe.Partition(labels, 2, "2:4").validate()


def ranks(seed: int, n: int, k: int, alpha: int) -> Tensor:
    """The random bits that turn the labels, -1 or 1: ``[n, groups, digits]``."""
    labels = SeededLabels.of(seed, (n, k), alpha).unpack().long()
    rank = ((labels ^ torch.arange(k)) & (alpha - 1))[:, ::alpha]
    bits = rank[..., None] >> torch.arange(alpha.bit_length() - 1) & 1
    return (2 * bits - 1).double()


def z_scores(a: Tensor, b: Tensor) -> Tensor:
    """Correlations of every row of one with every row of the other, in standard deviations of fair coins."""
    return a @ b.T / a.shape[1] ** 0.5


@pytest.mark.parametrize("alpha", ALPHAS)
def test_neurons_inputs_and_seeds_are_uncorrelated(alpha: int) -> None:
    """Of half a million pairs none may be beyond 6.5 standard deviations, and their spread is that of fair coins."""
    bits, other = ranks(1, 512, 1024, alpha), ranks(beside(1), 512, 1024, alpha)
    assert abs(float(bits.mean())) < 4 / bits.numel() ** 0.5
    neurons, inputs = bits.flatten(1), bits.flatten(1).T
    for scores in (z_scores(neurons, neurons), z_scores(inputs, inputs)):
        apart = scores[~torch.eye(len(scores), dtype=torch.bool)]
        assert abs(float(apart.square().mean()) - 1) < 0.03 and float(apart.abs().max()) < 6.5
    for scores in (z_scores(neurons, other.flatten(1)), z_scores(inputs, other.flatten(1).T)):
        assert abs(float(scores.square().mean()) - 1) < 0.03 and float(scores.abs().max()) < 6.5
    # Rectangles: a hash that were linear would have the fourth corner follow from three.
    corners = neurons[:-1, :-1] * neurons[1:, :-1] * neurons[:-1, 1:] * neurons[1:, 1:]
    assert abs(float(corners.mean())) < 5 / corners.numel() ** 0.5
    if alpha > 2:
        assert abs(float((bits[..., 0] * bits[..., 1]).mean())) < 4 / bits[..., 0].numel() ** 0.5


def test_seeds_that_differ_in_one_bit_agree_by_chance_alone() -> None:
    labels = [SeededLabels.of(1 << bit, (128, 256), 2).unpack() for bit in range(32)]
    pairs = labels[0].numel() / 2  # of a pair of inputs one label follows from the other
    for other in labels[1:]:
        assert abs(float((labels[0] == other).double().mean()) - 0.5) < 5 / (2 * pairs**0.5)


# Every operation.


class Made:
    """Small integers, in which sums are exact, and the operations on them with labels of some form."""

    def __init__(self, alpha: int, offsets: tuple[int, int] = (0, 0), n: int = 9, k: int = 139) -> None:
        self.alpha, self.labels = alpha, SeededLabels.of(5, (n, k), alpha, offsets)
        self.x, self.z, self.dy = integers(4, k), integers(4, alpha, k, seed=1), integers(4, alpha, n, seed=2)
        self.w = integers(n, k, seed=3)

    def run(self, labels: object, backend: str, dtype: torch.dtype) -> list[Tensor]:
        """Forward and backward of all of them, on the weight and on its transpose."""
        results = []
        for flip in (False, True):
            x, z, dy, w = (t.to(dtype) for t in (self.x, self.z, self.dy, self.w))
            given = labels.T if flip else labels  # type: ignore[attr-defined]
            if flip:
                x, z, dy, w = dy[:, 0].contiguous(), dy, z, w.T
            leaves = [t.clone().requires_grad_() for t in (x, z, dy, w)]
            x, z, dy, w = leaves
            results += [
                split_matmul(x, w, given, self.alpha, backend=backend),  # type: ignore[arg-type]
                merge_matmul(z, w, given, backend=backend),  # type: ignore[arg-type]
                partition_grad(dy, x, given, backend=backend),  # type: ignore[arg-type]
            ]
            grads = torch.autograd.grad([(r * r).sum() for r in results[-3:]], leaves)
            results += grads
        return [r.detach() for r in results]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("offsets", [(0, 0), (3, 77)])
def test_the_twins_take_a_seed_as_they_take_its_table(alpha: int, offsets: tuple[int, int]) -> None:
    made = Made(alpha, offsets)
    ours = made.run(made.labels, "eager", torch.float64)
    theirs = made.run(PackedLabels.pack(made.labels.unpack(), alpha), "eager", torch.float64)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_kept_values_take_a_seed_as_they_take_its_table(alpha: int) -> None:
    made = Made(alpha, (3, 77))
    kept = Bitmap.pack(torch.rand(9, 139, generator=seeded(1)) < 0.6)
    packed, v = PackedLabels.pack(made.labels.unpack(), alpha), kept.from_dense(made.w)

    def results(labels: PackedLabels | SeededLabels) -> list[Tensor]:
        found = []
        for turn in (False, True):
            given, exists = (labels.T, kept.T) if turn else (labels, kept)
            x, z, dy = (made.dy[:, 0], made.dy, made.z) if turn else (made.x, made.z, made.dy)
            leaves = [t.clone().requires_grad_() for t in (x, z, dy, v)]
            y = split_matmul(leaves[0], leaves[3], given, alpha, kept=exists)
            merged = merge_matmul(leaves[1], leaves[3], given, kept=exists)
            dv = partition_grad(leaves[2], leaves[0], given, kept=exists)
            found += [y, merged, dv, *torch.autograd.grad([(r * r).sum() for r in (y, merged, dv)], leaves)]
        return found

    assert all(torch.equal(a, b) for a, b in zip(results(made.labels), results(packed), strict=True))


def test_gradients_of_gradients() -> None:
    labels = SeededLabels.of(2, (3, 9), 4)
    x, w = torch.randn(2, 9, generator=seeded()).double(), torch.randn(3, 9, generator=seeded(1)).double()
    leaves = (x.requires_grad_(), w.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x, w: split_matmul(x, w, labels, 4), leaves)
    batch = torch.vmap(lambda x, w: split_matmul(x, w, labels, 4))(
        x.detach().expand(3, 2, 9), w.detach().expand(3, 3, 9)
    )
    assert torch.equal(batch[1], split_matmul(x, w, labels, 4))


@pytest.mark.parametrize("op", ["split_matmul", "merge_matmul", "partition_grad"])
def test_opcheck(op: str) -> None:
    made, none, seed = Made(2, n=3, k=9), None, [5, 2, 128]
    x, z, dy, w = (t.float().requires_grad_() for t in (made.x, made.z, made.dy, made.w))
    arguments = {
        "split_matmul": (x, w, none, seed, none, none, 2, False, "eager"),
        "merge_matmul": (z, w, none, seed, none, none, True, False, "eager"),
        "partition_grad": (dy, x, none, seed, False, "eager"),
    }[op]
    torch.library.opcheck(getattr(torch.ops.fpe, op).default, arguments)


def test_an_mlp_of_two_seeds() -> None:
    first, second = SeededLabels.of(1, (6, 20), 2), SeededLabels.of(2, (5, 6), 2)
    x, w1, w2 = integers(3, 20), integers(6, 20, seed=1), integers(5, 6, seed=2)
    y = expanded_mlp(x, w1, first, w2, second, alpha=2)
    assert torch.equal(y, expanded_mlp(x, w1, first.unpack(), w2, second.unpack(), alpha=2))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_shards_know_their_labels(alpha: int) -> None:
    """A layer in four parts, by rows and by columns: the parts' results are the whole's."""
    n, k = 10, 300
    whole, x, w = SeededLabels.of(9, (n, k), alpha), integers(3, k), integers(n, k, seed=1)
    meant = split_matmul(x, w, whole, alpha)
    got = torch.zeros_like(meant)
    for rows in (slice(0, 6), slice(6, n)):
        for columns in (slice(0, 128), slice(128, k)):
            part = w[rows, columns]
            labels = SeededLabels.of(9, tuple(part.shape), alpha, (rows.start, columns.start))  # type: ignore[arg-type]
            assert torch.equal(labels.unpack(), whole.unpack()[rows, columns]) and labels.why_no_kernel is None
            got[:, :, rows] += split_matmul(x[:, columns], part, labels, alpha)
    assert torch.equal(got, meant)


@pytest.mark.parametrize("turned", [False, True])
def test_a_part_of_either_orientation(turned: bool) -> None:
    """And a part of a part: where each begins adds up."""
    whole = SeededLabels.of(9, (10, 300), 4)
    whole = whole.T if turned else whole
    (n, k), table = whole.sizes, whole.unpack()
    part = whole.part((2, n), (1, k - 1))
    assert torch.equal(part.unpack(), table[2:, 1 : k - 1]) and part.sizes == (n - 2, k - 2)
    assert torch.equal(part.part((3, 5), (2, 7)).unpack(), table[5:7, 3:8])


def test_the_key_holds_where_a_part_begins() -> None:
    """What a kernel adds to what it hashes: seed and offsets in one signed word."""
    labels = SeededLabels.of(9, (4, 4), 2, (6, 384))
    begins = SeededLabels.of(9, (4, 4), 2).key + 3 * 0x9E3779B1 + 12 * 0x85EBCA77
    assert labels.key == signed(begins % 2**32) and -(2**31) <= labels.key < 2**31


# What is refused.


def _split(labels: object, alpha: int = 2, backend: str = "eager") -> Callable[[], Tensor]:
    return lambda: split_matmul(torch.ones(1, 6), torch.ones(4, 6), labels, alpha, backend=backend)  # type: ignore[arg-type]


FITS = SeededLabels.of(1, (4, 6), 2)
BAD = (
    BadCall("alpha", lambda: SeededLabels.of(1, (4, 6), 3), ValueError, ("(2, 4, 8)", "3")),
    BadCall("seed", lambda: SeededLabels.of(2**32, (4, 6), 2), ValueError, ("2^32", str(2**32))),
    BadCall("negative", lambda: SeededLabels.of(-1, (4, 6), 2), ValueError, ("from 0", "-1")),
    BadCall("float", lambda: SeededLabels.of(1.5, (4, 6), 2), TypeError, ("integer", "float")),  # type: ignore[arg-type]
    BadCall("offsets", lambda: SeededLabels.of(1, (4, 6), 2, (0, -2)), ValueError, ("offsets", "-2")),
    BadCall("shape", lambda: SeededLabels.of(1, 4, 2), ValueError, ("SeededLabels.of", "shape", "4")),  # type: ignore[arg-type]
    BadCall("whole-alpha", lambda: SeededLabels.of(1, (4, 6), 2.0), ValueError, ("(2, 4, 8)", "2.0")),  # type: ignore[arg-type]
    BadCall("rows", lambda: FITS.part((0, 5), (0, 6)), ValueError, ("part: rows", "0 .. 4", "(0, 5)")),
    BadCall("columns", lambda: FITS.T.part((0, 6), (3, 2)), ValueError, ("part: columns", "0 .. 4", "(3, 2)")),
    BadCall("begin", lambda: FITS.part((-1, 2), (0, 6)), ValueError, ("part: rows", "(-1, 2)")),
    BadCall(
        "kept-turned",
        lambda: split_matmul(torch.ones(1, 6), torch.ones(24), FITS, 2, kept=Bitmap.pack(torch.ones(6, 4) > 0).T),
        ValueError,
        ("one orientation", "False and True"),
    ),
    BadCall("turned", _split(FITS.T), ValueError, ("split_matmul", "[4, 6]")),
    BadCall("children", _split(FITS, 4), ValueError, ("alpha = 4", "alpha = 2")),
    BadCall("by-hand", _split(FITS._replace(seed=-3)), ValueError, ("split_matmul", "seed", "-3")),
    BadCall("part", _split(FITS._replace(offsets=(1, 0)), 2, "triton"), UnsupportedError, ("2 rows", "(1, 0)")),
    BadCall(
        "sparse",
        lambda: merge_matmul(torch.ones(1, 2, 6), torch.ones(4, 6), FITS, backend="torch"),
        UnsupportedError,
        ("merge_matmul", "'torch'", "seed"),
    ),
    BadCall("partition-seed", lambda: fpe.Partition(FITS.unpack(), 2, "seeded"), ValueError, ("seed", "None")),
    BadCall(
        "partition-labels",
        lambda: fpe.Partition(1 - FITS.unpack(), 2, "seeded", seed=1).validate(),
        ValueError,
        ("labels[0, 0]", "seed 1"),
    ),
    BadCall("expand-seed", lambda: fpe.expand(mlp(8, 6, 4), seed=1), ValueError, ("seeded", "random")),
    BadCall("expand-alpha", lambda: fpe.expand(mlp(8, 6, 4), 3, structure="seeded"), ValueError, ("(2, 4, 8)", "3")),
    BadCall(
        "turned-random",
        lambda: fpe.Partition(FITS.unpack(), 2, turned=True),
        ValueError,
        ("turned", "seed = None"),
    ),
    BadCall(
        "turned-kept",
        lambda: fpe.Partition.seeded(4, 6, 2, 1, kept=3, turned=True),
        ValueError,
        ("turned", "kept = 3"),
    ),
    BadCall(
        "turned-holes",
        lambda: fpe.MergeLinear(fpe.Partition.seeded(4, 6, 2, 1, turned=True).without(FITS.unpack() == 0)),
        ValueError,
        ("MergeLinear", "turned", "every position"),
    ),
    BadCall(
        "turned-labels",
        lambda: fpe.Partition(FITS.unpack(), 2, "seeded", seed=1, turned=True).validate(),
        ValueError,
        ("labels[", "seed 1"),
    ),
    BadCall("restore", lambda: fpe.restore(mlp(8, 6, 4), {}, seed=1), ValueError, ("restore", "alpha", "None")),
)


@pytest.mark.parametrize("case", BAD, ids=readable_id)
def test_bad_calls(case: BadCall) -> None:
    case.check()


# Layers.


def _expanded(seed: int = 7, alpha: int = 2) -> tuple[nn.Sequential, nn.Sequential]:
    dense = mlp(24, 17, 6)
    return dense, fpe.expand(dense, alpha, structure="seeded", resparsify="partition", seed=seed)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_layer_is_its_parents_tensor_and_a_header(alpha: int) -> None:
    dense, wide = _expanded(alpha=alpha)
    state = wide.state_dict()
    for name in ("0", "2"):
        parent = dense.get_submodule(name).weight
        assert torch.equal(state[f"{name}.edge_weight"], parent)
        assert state[f"{name}._extra_state"].nbytes <= 64
        layer = wide.get_submodule(name)
        assert isinstance(layer, ExpandedLinear) and not layer.topology_tensors()
    assert sum(p.numel() for n, p in wide.named_parameters() if n.endswith("weight")) == fpe.nonzeros(dense)
    first, second = wide[0].partition, wide[2].partition
    assert (first.seed, second.seed) == (7, 8) and torch.equal(
        first.labels, SeededLabels.of(7, (17, 24), alpha).unpack()
    )


@pytest.mark.parametrize(("alpha", "neurons"), [(2, 2), (2, 3), (4, 3), (4, 4), (4, 7), (8, 9)])
def test_a_second_layer_of_one_group_deals_its_outputs(alpha: int, neurons: int) -> None:
    """Where the neurons were dealt, an output would see one of ``alpha`` sets of children that share none."""
    dense = mlp(24, neurons, 64)
    wide = fpe.expand(dense, alpha, structure="seeded", resparsify="partition", seed=7)
    second = wide[2].partition
    assert second.turned and second.seed == 8 and not wide[0].partition.turned
    assert torch.equal(second.labels, SeededLabels.of(8, (neurons, 64), alpha).unpack().T)
    groups = second.labels.T.reshape(neurons, -1, alpha).sort(-1).values
    assert torch.equal(groups, torch.arange(alpha, dtype=torch.uint8).expand_as(groups))
    assert len(second.labels.unique(dim=0)) > (alpha if neurons > 2 else 2)
    state = wide.state_dict()
    assert torch.equal(state["2.edge_weight"], dense[2].weight) and state["2._extra_state"].nbytes <= 64
    x = torch.randn(5, 24, generator=seeded(4))
    for again in (
        fpe.restore(mlp(24, neurons, 64), state),
        fpe.restore(mlp(24, neurons, 64), dense.state_dict(), alpha=alpha, seed=7),
    ):
        assert torch.equal(again(x), wide(x)) and again[2].partition.turned
    enough = fpe.expand(mlp(24, 2 * alpha, 64), alpha, structure="seeded", resparsify="partition", seed=7)
    assert not enough[2].partition.turned


def test_a_layer_of_the_first_version_stays_one() -> None:
    """A state says which version it means, whatever an expansion would choose now; one may follow the other."""
    old = fpe.MergeLinear(fpe.Partition.seeded(6, 4, 4, 3))
    new = fpe.MergeLinear(fpe.Partition.seeded(6, 4, 4, 3, turned=True))
    assert not torch.equal(old.labels, new.labels)
    x, meant = torch.randn(5, 16, generator=seeded(4)), new.labels.clone()
    old.load_state_dict(new.state_dict())
    assert torch.equal(old(x), new(x)) and torch.equal(old.partition.labels, meant) and old.partition.turned
    first = fpe.MergeLinear(fpe.Partition.seeded(6, 4, 4, 3))
    new.load_state_dict(first.state_dict())
    assert torch.equal(new(x), first(x)) and not new.partition.turned


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_a_turned_layer_learns_as_its_table_does(backend: str) -> None:
    """Output and every gradient, in integers, where sums are exact."""
    partition = fpe.Partition.seeded(70, 5, 4, 3, turned=True)
    results = []
    for labels in (partition, fpe.Partition(partition.labels, 4)):
        layer = fpe.MergeLinear(labels, backend=backend)
        layer.set_matrix(integers(70, 5, seed=3).float())
        torch.nn.init.ones_(layer.bias)
        x = integers(6, 20).float().requires_grad_()
        y = layer(x)
        results.append([y, *torch.autograd.grad((y * y).sum(), [x, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_dense_checkpoint_and_a_seed_are_an_expanded_model() -> None:
    dense, wide = _expanded()
    x = torch.randn(5, 24, generator=seeded(4))
    again = fpe.restore(mlp(24, 17, 6), dense.state_dict(), alpha=2, seed=7)
    assert torch.equal(again(x), wide(x))
    with torch.device("meta"):
        empty = mlp(24, 17, 6)
    assert torch.equal(fpe.restore(empty, dense.state_dict(), alpha=2, seed=7)(x), wide(x))
    other = fpe.restore(mlp(24, 17, 6), dense.state_dict(), alpha=2, seed=8)
    assert not torch.equal(other(x), wide(x))


def test_a_state_brings_its_seed_and_a_damaged_one_is_refused() -> None:
    (_, wide), (_, other) = _expanded(), _expanded(99)
    x = torch.randn(5, 24, generator=seeded(4))
    other.load_state_dict(wide.state_dict())
    assert torch.equal(other(x), wide(x)) and other[0].partition.seed == 7
    mean = {name: (a + b) // 2 if a.dtype == torch.int64 else a for (name, a), b in
            zip(wide.state_dict().items(), _expanded(100)[1].state_dict().values(), strict=True)}  # fmt: skip
    mean["0._extra_state"][-1] += 1
    with pytest.raises(ValueError, match="damaged"):
        other.load_state_dict(mean)
    later = {name: value.clone() for name, value in wide.state_dict().items()}
    later["0._extra_state"][-2:] += 2 << 32
    with pytest.raises(ValueError, match="version"):
        other.load_state_dict(later)


@pytest.mark.parametrize("policy", ["input", "magnitude"])
def test_a_layer_that_loses_edges_keeps_its_seed(policy: str) -> None:
    """It stores its kept values and a bit for each place: who owns them is not stored."""
    dense = mlp(24, 13, 6)
    wide = fpe.expand(dense, structure="seeded", resparsify=policy, seed=7)
    layer, meant = wide[0], SeededLabels.of(7, (13, 24), 2).unpack()
    kept = layer.labels != fpe.kernels.HOLE
    assert (layer.structure, layer.partition.seed) == ("seeded", 7) and 0 < int(kept.sum()) < kept.numel()
    assert torch.equal(layer.labels[kept], meant[kept]) and layer.edge_weight.shape == (int(kept.sum()),)
    assert fpe.nonzeros(wide) == fpe.nonzeros(dense)
    assert [t.dtype for t in layer.topology_tensors()] == [t.dtype for t in layer.bitmap if isinstance(t, Tensor)]
    assert layer.get_extra_state().nbytes == 80 + 8 * -(-kept.numel() // 64)
    x = torch.randn(5, 24, generator=seeded(4))
    random = fpe.SplitLinear(fpe.Partition(layer.labels, 2))
    random.load_state_dict({"edge_weight": layer.edge_weight, "bias": layer.bias}, strict=False)
    assert torch.equal(layer(x), random(x))
    again = fpe.restore(mlp(24, 13, 6), wide.state_dict())
    assert again[0].partition.seed == 7 and torch.equal(again(x), wide(x))
    state = wide.state_dict()
    state["0._extra_state"] = torch.cat([state["0._extra_state"], state["0._extra_state"].new_zeros(1)])
    with pytest.raises(ValueError, match="1 words more"):
        fpe.restore(mlp(24, 13, 6), state)


@pytest.mark.parametrize("regrow", ["random", "gradient"])
def test_edges_move_to_places_of_their_own_children_alone(regrow: str) -> None:
    wide = fpe.expand(mlp(24, 13, 6), structure="seeded", resparsify="magnitude", seed=7)
    optimizer = torch.optim.Adam(wide.parameters())
    rewiring = fpe.Rewiring(wide, optimizer, every=1, regrow=regrow, generator=seeded(1))  # type: ignore[arg-type]
    before, meant = wide[0].labels.clone(), SeededLabels.of(7, (13, 24), 2).unpack()
    for _ in range(3):
        optimizer.zero_grad()
        wide(torch.randn(5, 24, generator=seeded(4))).square().sum().backward()
        optimizer.step()
        rewiring.step()
    now = wide[0].labels
    kept = now != fpe.kernels.HOLE
    assert not torch.equal(now, before) and int(kept.sum()) == int((before != fpe.kernels.HOLE).sum())
    assert torch.equal(now[kept], meant[kept]) and wide[0].partition.seed == 7
