"""Packing 2:4 weights in one launch: bit for bit the eager packing, in every form, from every source."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from semi_structured_cases import Case as Parent
from support import readable_id, seeded, strided
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fpe.bench.lab import sanitize
from fpe.bench.lab.trace import tracing
from fpe.kernels import HOLE, SemiStructuredLayout, model
from fpe.kernels.semi_structured import pack, quads, sparse_tensor_core
from fpe.kernels.semi_structured.fragments import pack_weights

FORMS = ("fragments", "rows", "dense")
KERNELS = ((pack, "_pack"), (pack, "_pack_transposed"), (quads, "_compress"))


@dataclass(frozen=True)
class Case:
    """A parent ``[n, k]``, what is packed of it, and how many edges are gone."""

    source: str
    n: int
    k: int
    alpha: int = 2
    children: int = 2
    holes: float = 0.3
    form: str = "contiguous"

    @property
    def id(self) -> str:
        return f"{self.source}-{self.n}x{self.k}-{self.alpha}-{self.children}-{self.holes}-{self.form}"

    def weight(self, dtype: torch.dtype) -> Tensor:
        return strided((self.n, self.k), self.form, seeded(3)).to(dtype)

    def made(self, dtype: torch.dtype) -> tuple[Callable[[Any], Tensor], Tensor, SemiStructuredLayout]:
        """What packs into a form; and by the eager twin its values and their layout."""
        w, parent = self.weight(dtype), Parent(n=self.n, k=self.k, children=self.children, holes=self.holes)
        if self.source == "parent":
            labels = torch.randint(self.alpha, (self.n, self.k), generator=seeded(1)).to(torch.uint8)
            labels[torch.rand(labels.shape, generator=seeded(2)) < self.holes] = HOLE
            layout = SemiStructuredLayout.interleaved(labels, self.alpha)
            if not self.holes and self.alpha == 2:
                layout = layout._replace(kept=None)
            codes, kept, inputs = layout.codes, layout.kept, layout.shape[1]
            make = lambda form: pack.pack_parent(w, self.alpha, kept, form, codes, inputs)  # noqa: E731
            return make, layout.from_parent(w), layout
        own = parent.layout()
        values = own.from_dense(w)
        if self.source == "values":
            make = lambda form: pack.pack_values(values, form, own.codes, self.k)  # noqa: E731
            return make, values, own
        turned, layout = own.transposed(values)
        make = lambda form: pack.pack_transposed(values, own.codes, self.k, form, layout.codes)  # noqa: E731
        return make, turned, layout


SIZES = ((1, 1), (7, 24), (33, 203), (70, 132), (130, 67), (64, 128), (136, 300))
CASES = (
    *(Case("values", n, k) for n, k in SIZES),
    *(Case("values", n, k, children=1) for n, k in SIZES[1:3]),
    *(Case("transposed", n, k) for n, k in SIZES),
    *(Case("parent", n, k, form=form) for n, k in SIZES for form in ("contiguous", "transposed")),
    *(Case("parent", n, k, alpha=4, form=form) for n, k in SIZES[1:4] for form in ("contiguous", "transposed")),
    *(Case("parent", 40, 72, form=form, holes=0.0) for form in ("contiguous", "transposed", "sliced", "expanded")),
    Case("transposed", 40, 72, holes=0.0),
)
each_case = pytest.mark.parametrize("case", CASES, ids=readable_id)


def eager(form: str, values: Tensor, layout: SemiStructuredLayout) -> Tensor:
    forms = {
        "fragments": lambda: pack_weights(values),
        "rows": lambda: values.flatten(0, 1),
        "dense": lambda: layout.to_dense(values).flatten(0, 1),
    }
    return forms[form]()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=readable_id)
@pytest.mark.parametrize("form", FORMS)
@each_case
def test_it_is_the_eager_packing(case: Case, form: str, dtype: torch.dtype) -> None:
    make, values, layout = case.made(dtype)
    got = make(form)
    assert torch.equal(got, eager(form, values, layout)) and got.is_contiguous()


def test_what_lies_past_the_inputs_is_no_weight_of_the_other_side() -> None:
    layout = Parent(n=33, k=203).layout()
    values = layout.from_dense(Case("values", 33, 203).weight(torch.bfloat16))
    dirty = values.masked_fill(layout.positions() >= 203, 3.0)
    got, want = (pack.pack_transposed(v, layout.codes, 203, "fragments") for v in (dirty, values))
    assert not torch.equal(dirty, values) and torch.equal(got, want)


@pytest.mark.parametrize("case", [c for c in CASES if (c.n, c.k) in ((33, 203), (40, 72))], ids=readable_id)
def test_no_access_leaves_a_tensor_and_no_programs_race(case: Case) -> None:
    make = case.made(torch.float16)[0]
    for form in FORMS:
        assert sanitize.check(KERNELS, lambda form=form: make(form)) == []


def test_offsets_beyond_32_bits() -> None:
    """Rows of the parent 2**30 elements apart: the third begins past 2**31. Untouched pages cost no memory."""
    near = torch.randn(3, 40, generator=seeded()).half()
    for far in (
        torch.empty(2**31 + 64, dtype=torch.half).as_strided((3, 40), (2**30, 1)),
        torch.empty(2**31 + 64, dtype=torch.half).as_strided((40, 3), (1, 2**30)).T,
    ):
        far.copy_(near)
        assert torch.equal(pack.pack_parent(far, 2, None, "fragments"), pack.pack_parent(near, 2, None, "fragments"))


def test_a_type_that_sparse_tensor_cores_do_not_take_is_refused() -> None:
    with pytest.raises(TypeError, match=r"float16 or bfloat16, got torch\.float32"):
        pack.pack_values(torch.zeros(1, 4, 8), "fragments")


# What a packing moves, as the cost model charges it.


class Operations(TorchDispatchMode):
    """What PyTorch itself is asked to do, views and new memory aside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if not func.is_view and name not in ("empty", "new_empty", "detach"):
            self.names.append(name)
        return result


class Launch:
    """Stands for a kernel: counts its launches."""

    count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **kwargs: object) -> None:
            self.count += 1

        return launch


def test_a_changed_weight_is_one_launch_and_nothing_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    w, labels = torch.ones(64, 128).bfloat16(), torch.randint(2, (64, 128), generator=seeded()).to(torch.uint8)
    merged, layout = SemiStructuredLayout.interleaved(labels)._replace(kept=None), Parent(n=64, k=128).layout()
    values = layout.from_dense(w)
    backend, launch = sparse_tensor_core, Launch()
    for name in ("_pack", "_pack_transposed"):
        monkeypatch.setattr(pack, name, launch)
    packings = (
        lambda: backend._packed(values, layout.codes),
        lambda: backend._packed_transposed(values, layout.codes, 128),
        lambda: backend._packed_parent(w, 2, merged.codes, None, merged.quads),
    )
    for packing in packings:
        packing()  # codes and metadata, once
        w.mul_(2), values.mul_(2)
        launch.count = 0
        with Operations() as seen:
            packing()
        assert (launch.count, seen.names) == (1, [])


def moved(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes that launches ask for and store, and how many launches there are."""
    with tracing(KERNELS) as traces:
        run()
    touches = [t for trace in traces for program in trace.programs.values() for t in program]
    return sum(t.offsets.size * t.itemsize for t in touches), len(traces)


@pytest.mark.parametrize(
    ("name", "op", "structure", "alpha"),
    [
        *product(("sparse tensor cores", "torch.sparse"), ("split_matmul", "merge_matmul"), ("2:4",), (2,)),
        *product(("sparse tensor cores", "torch.sparse"), ("merge_matmul",), ("random",), (2,)),
        ("sparse tensor cores", "merge_matmul", "random", 4),
    ],
)
def test_the_model_charges_what_the_launches_move(name: str, op: str, structure: str, alpha: int) -> None:
    """A parent of whole tiles, no edge gone, packed by the backends' own functions."""
    n, k = 128, 256
    form = "fragments" if name == "sparse tensor cores" else "dense"
    source = "parent" if structure == "random" else "values" if op == "split_matmul" else "transposed"
    case = Case(source, n, k, alpha=alpha, holes=0.0)
    make, _, layout = case.made(torch.bfloat16)

    def split() -> None:
        values = quads.semi_structured_compress_triton(case.weight(torch.bfloat16), layout)
        pack.pack_values(values, form, layout.codes, k)

    own = (0, 0)
    if form == "dense":  # the library's own: it reads the wide weight, writes values and two bits for each
        own = (2 * 2 * n * k + 2 * n * k + n * k * 2 // 8, 1)
    bytes_, launches = moved(split if op == "split_matmul" else lambda: make(form))
    assert (bytes_ + own[0], launches + own[1]) == model.repacking(name, op, structure, n * k, alpha, 2)
