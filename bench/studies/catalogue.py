"""The studies on multi-layer perceptrons, as lists of cells. Those of one data set share a file: a cell runs once."""

from collections.abc import Callable, Sequence
from typing import Any

from fpe import resparsify
from fpe.kernels.structures import SEEDED, TWO_FOUR

from . import figures as drawn_as
from . import published
from . import tables as shown_as
from .conditions import CONTINUED, DENSE, DROPCONNECT, FRESH, OVERLAPPING, SEEDED_HOLES, STATIC, WIDE
from .mlp import Cell, Settings, TenTrials, run_cell
from .study import committed
from .sweep import Sweep

PAPERS = "random magnitude"
"""The paper's own expansion: a random split, one magnitude ranking over both layers."""

DEFAULT = "random auto"
"""What :func:`fpe.expand` does unless it is told otherwise."""

BLOCKS = ("1x16", "4x16", "16x16", "16x64", "64x64")


def _controls(widths: Sequence[int]) -> list[Cell]:
    return [Cell(condition, neurons) for neurons in widths for condition in (DENSE, CONTINUED)]


def _few(neurons: int, layers: int = 2, around: int = 0) -> list[Cell]:
    return [Cell(condition, neurons, layers=layers, around=around) for condition in (CONTINUED, PAPERS)]


def budget() -> list[Cell]:
    """Every policy on every structure to 32 neurons; at 64, and at alpha = 4 beyond 8, the ones worth comparing."""
    cells = _controls((8, 4, 16, 32, 64))
    for alpha, widths in ((2, (8, 4, 16, 32)), (4, (8, 4))):
        masks = ("random", "shared", TWO_FOUR) if alpha == 2 else ("random", "shared")  # 2:4 is for two children
        for neurons in widths:
            blocks = [b for b in BLOCKS if b != "64x64" or (neurons, alpha) == (8, 2) or neurons > 16]  # else as 16x64
            cells += [Cell(f"{m} {p}", neurons, alpha) for m in masks for p in ("magnitude", "input", "partition")]
            cells += [Cell(f"{b} {p}", neurons, alpha) for b in blocks for p in resparsify.POLICIES]
    few = (PAPERS, "random input", "random partition", "4x16 input", "16x64 input")
    cells += [Cell(condition, 64) for condition in (*few, "64x64 input", "2:4 input", "shared magnitude")]
    cells += [Cell(condition, neurons, alpha=4) for neurons in (16, 32, 64) for condition in few]
    return [*cells, Cell("random partition", 8, alpha=8)]


def controls() -> list[Cell]:
    """What else the same weights, or as many, could have been spent on."""
    named = (PAPERS, OVERLAPPING, DROPCONNECT, f"{DROPCONNECT} 10%", STATIC, FRESH, WIDE)
    return _controls((8, 4, 16)) + [Cell(condition, neurons) for neurons in (8, 4, 16) for condition in named]


def vision() -> list[Cell]:
    """Widths, alpha, the split's time, and dense networks a little wider: how many weights a split is worth."""
    widths = (4, 8, 16, 32, 64, 128)
    cells = _controls(widths)
    for alpha, random, gram in ((2, 6, 5), (4, 6, 5), (8, 5, 3)):  # so many of the widths
        cells += [Cell(PAPERS, neurons, alpha) for neurons in widths[:random]]
        cells += [Cell("gram magnitude", neurons, alpha) for neurons in widths[:gram]]
    cells += [Cell(PAPERS, 8, split=share) for share in (0.1, 0.3, 0.7, 0.9)]
    return cells + [Cell(CONTINUED, neurons) for neurons in (5, 6, 10, 12, 20, 24, 40, 48)]


def deep() -> list[Cell]:
    """Several hidden layers with LayerNorm, every other one expanded (Table A3)."""
    return [
        Cell(condition, neurons, layers=layers)
        for layers in published.DEEP
        for neurons in published.DEEP[layers]
        for condition in (CONTINUED, PAPERS, DEFAULT)
    ]


def many_classes() -> list[Cell]:
    """Five layers on a set of many classes (Table A4)."""
    return [Cell(condition, n, layers=5) for n in published.IMAGENET for condition in (CONTINUED, PAPERS, DEFAULT)]


def hidden() -> list[Cell]:
    """The pair in the middle of 64 wide layers: as many outputs as inputs, so both layers must lose weights."""
    named = [CONTINUED, PAPERS, "random partition", "2:4 magnitude", "2:4 partition", "4x4 magnitude", "4x4 block"]
    named += ["4x4 partition", "shared magnitude", "gram magnitude", FRESH, "fresh random partition", WIDE]
    cells = [Cell(condition, neurons, around=64) for neurons in (8, 32) for condition in named]
    few = (PAPERS, "random partition", "4x4 partition")
    cells += [Cell(condition, neurons, alpha=4, around=64) for neurons in (8, 32) for condition in few]
    return cells + [Cell(condition, 64, around=64) for condition in (CONTINUED, *few, "fresh random partition", WIDE)]


def rewiring() -> list[Cell]:
    """Masks that move while the expanded network trains, beside masks that stay."""
    widths = (4, 8, 16)
    cells = _controls(widths)
    for condition in (PAPERS, "2:4 magnitude", "4x16 input"):
        cells += [Cell(condition, n, rewire=regrow) for n in widths for regrow in ("", "random", "gradient")]
    return cells


def seeded() -> list[Cell]:
    """Labels that are a function of a seed beside labels dealt at random, under every policy that keeps both."""
    named = [f"{kind} {policy}" for policy in ("partition", "input", "magnitude") for kind in ("random", SEEDED)]
    named.append(f"{SEEDED} input{SEEDED_HOLES}")
    return [Cell(condition, neurons, alpha) for neurons in (4, 8, 16, 32) for alpha in (2, 4) for condition in named]


CIFAR100 = "mlp-cifar100_lite2_512"
"""Committed rows of the perceptrons on CIFAR-100 features; the other files' names say theirs."""
FASHION = "mlp-fashion-mnist"
SEEDED_ROWS = {"cifar100": "seeded-cifar100_lite2_512", "fashion": "seeded-fashion-mnist"}


def _study(
    name: str,
    about: str,
    cells: Callable[[], list[Cell]],
    small: Sequence[Cell],
    rows_in: str = "mlp",
    settings: type = Settings,
    **drawn: Any,
) -> Sweep:
    """A sweep of perceptrons; ``drawn`` are its tables and figures."""
    return Sweep(
        name,
        about,
        rows_in,
        settings,
        cells,
        run_cell,
        lambda results, shown: shown_as.perceptrons(results, shown, name.capitalize()),
        small,
        {"trials": 2, "epochs": 1, "batch": 128, "data": "digits"},
        **drawn,
    )


STUDIES = (
    _study(
        "budget",
        "Compare every policy that removes the wider pair's extra weights, on every structure of the masks.",
        budget,
        [Cell(c, 4) for c in (CONTINUED, PAPERS, "2:4 input", "4x16 block", "shared partition")],
        tables={
            "budget": lambda: shown_as.by_width(committed(CIFAR100), budget()),
            "by-width": lambda: shown_as.by_width(committed(CIFAR100), shown_as.CHOICES),
            "paired": lambda: shown_as.paired(committed(CIFAR100)),
            "two-four": lambda: shown_as.two_four(committed(CIFAR100)),
        },
        figures={"budget": lambda: drawn_as.budget(committed(CIFAR100))},
    ),
    _study(
        "controls",
        "Compare FPE with overlapping children, DropConnect, static sparsity, fresh weights and wider networks.",
        controls,
        [Cell(c, 4) for c in (CONTINUED, PAPERS, OVERLAPPING, DROPCONNECT, STATIC, FRESH, WIDE)],
        tables={"controls": lambda: shown_as.by_width(committed(CIFAR100), controls())},
    ),
    _study(
        "vision-sweep",
        "Sweep widths, alpha and the time of the split; dense networks of more weights beside them.",
        vision,
        [*_few(4), Cell("gram magnitude", 4), Cell(PAPERS, 4, split=0.0)],
        tables={
            "vision-cifar100": lambda: shown_as.by_width(committed(CIFAR100), vision()),
            "vision-fashion": lambda: shown_as.by_width(committed(FASHION), vision()),
            "equivalent": lambda: shown_as.equivalent(committed(CIFAR100)),
        },
        figures={
            "widths": lambda: drawn_as.widths([committed(CIFAR100), committed(FASHION)]),
            "vision-sweep": lambda: drawn_as.vision(committed(CIFAR100)),
        },
    ),
    _study(
        "deep",
        "Expand every other layer of deep networks with LayerNorm (Table A3).",
        deep,
        _few(4, layers=5),
        "deep",
        TenTrials,
        tables={"deep": lambda: shown_as.deep(committed("deep-cifar100_lite2_512"))},
    ),
    _study(
        "many-classes",
        "Expand every other one of five layers on a set of many classes (Table A4).",
        many_classes,
        _few(6, layers=5),
        tables={"many-classes": lambda: shown_as.many_classes(committed("mlp-wordnet1000_minilm_384"))},
    ),
    _study(
        "hidden",
        "Expand a pair whose output is as wide as its input.",
        hidden,
        _few(8, around=16),
        tables={"hidden": lambda: shown_as.by_width(committed(CIFAR100), hidden())},
        figures={"hidden": lambda: drawn_as.hidden(committed(CIFAR100))},
    ),
    _study(
        "rewiring",
        "Let the masks move while training goes on, with random and with gradient regrowth.",
        rewiring,
        [Cell(c, 4, rewire=r) for c in (PAPERS, "4x16 input") for r in ("random", "gradient")],
        tables={"rewiring": lambda: shown_as.rewiring(committed(CIFAR100))},
    ),
    _study(
        "seeded",
        "Compare labels that are a function of a seed with labels dealt at random.",
        seeded,
        [Cell(f"{kind} {policy}", 4) for policy in ("partition", "input") for kind in ("random", SEEDED)]
        + [Cell(f"{SEEDED} input{SEEDED_HOLES}", 4)],
        "seeded",
        TenTrials,
        tables={
            f"seeded-{name}": lambda rows=rows: shown_as.paired(committed(rows), shown_as.OF_A_SEED, together=True)
            for name, rows in SEEDED_ROWS.items()
        },
        figures={"seeded": lambda: drawn_as.of_a_seed([committed(rows) for rows in SEEDED_ROWS.values()])},
    ),
)
