"""The studies on multi-layer perceptrons, as lists of cells. Those of one data set share a file: a cell runs once."""

from collections.abc import Callable, Sequence

from .conditions import CONTINUED, DENSE, DROPCONNECT, FRESH, OVERLAPPING, STATIC, WIDE
from .mlp import Cell, Settings, run_cell
from .sweep import Study
from .tables import perceptrons

PAPERS = "random magnitude"
"""The paper's own expansion: a random split, one magnitude ranking over both layers."""

BLOCKS = ("1x16", "4x16", "16x16", "16x64", "64x64")


def _controls(widths: Sequence[int]) -> list[Cell]:
    return [Cell(condition, neurons) for neurons in widths for condition in (DENSE, CONTINUED)]


def _few(neurons: int, layers: int = 2, around: int = 0) -> list[Cell]:
    return [Cell(condition, neurons, layers=layers, around=around) for condition in (CONTINUED, PAPERS)]


def budget() -> list[Cell]:
    """Every policy on every structure at 8 neurons; at other widths and at alpha = 4 the ones worth comparing."""
    cells = _controls((8,))
    cells += [Cell(f"{s} {p}", 8) for s in ("random", "2:4", "shared") for p in ("magnitude", "input", "partition")]
    cells += [Cell(f"{s} {p}", 8) for s in BLOCKS for p in ("magnitude", "input", "block", "partition")]
    four = (PAPERS, "random input", "random partition", "shared magnitude", "1x16 input", "4x16 input", "4x16 block")
    cells += [Cell(condition, 8, alpha=4) for condition in four] + [Cell("random partition", 8, alpha=8)]
    others = (PAPERS, "random input", "2:4 magnitude", "2:4 input", "4x16 input", "16x64 input", "shared magnitude")
    for neurons in (4, 16):
        cells += _controls((neurons,)) + [Cell(condition, neurons) for condition in others]
        cells += [Cell(condition, neurons, alpha=4) for condition in (PAPERS, "random input", "4x16 input")]
    cells += _controls((32, 64)) + [Cell(c, 32) for c in (PAPERS, "random input", "2:4 input", "16x64 input")]
    return cells + [Cell(condition, 64) for condition in (PAPERS, "64x64 input")]


def controls() -> list[Cell]:
    """What else the same weights, or as many, could have been spent on."""
    named = (PAPERS, OVERLAPPING, DROPCONNECT, STATIC, FRESH, WIDE)
    return _controls((4, 8)) + [Cell(condition, neurons) for neurons in (8, 4) for condition in named]


def vision() -> list[Cell]:
    """Widths, alpha, the split's time, and dense networks a little wider: how many weights a split is worth."""
    cells = _controls((4, 8, 16)) + [Cell(PAPERS, neurons) for neurons in (4, 8, 16)]
    cells += [Cell(PAPERS, 8, split=share) for share in (0.1, 0.3, 0.7, 0.9)]
    cells += [Cell(PAPERS, neurons, alpha=alpha) for alpha in (4, 8) for neurons in (4, 8)]
    cells += [Cell("gram magnitude", neurons) for neurons in (4, 8)]
    return cells + [Cell(CONTINUED, neurons) for neurons in (10, 12)]


def deep() -> list[Cell]:
    """Several hidden layers with LayerNorm, every other one expanded (Table A3)."""
    cells = []
    for layers, widths in ((5, (4, 8)), (9, (4, 8))):
        for neurons in widths:
            cells += [Cell(condition, neurons, layers=layers) for condition in (CONTINUED, PAPERS)]
    return cells


def hidden() -> list[Cell]:
    """The pair in the middle of 64 wide layers: as many outputs as inputs, so that both layers must pay."""
    named = [CONTINUED, PAPERS, "random partition", "2:4 magnitude", "2:4 partition", "4x4 magnitude", "4x4 block"]
    named += ["4x4 partition", "shared magnitude", "gram magnitude", FRESH, WIDE]
    cells = [Cell(condition, 8, around=64) for condition in named]
    return cells + [Cell(condition, 32, around=64) for condition in (CONTINUED, PAPERS, "random partition")]


def rewiring() -> list[Cell]:
    """Masks that move while the expanded network trains, beside masks that stay."""
    cells = _controls((4, 8, 16)) + [Cell(PAPERS, n, rewire=regrow) for n in (4, 8, 16) for regrow in ("", "random")]
    cells += [Cell("2:4 magnitude", 8), Cell("2:4 magnitude", 8, rewire="random")]
    return [*cells, Cell(PAPERS, 8, rewire="gradient")]


def _study(name: str, about: str, cells: Callable[[], list[Cell]], small: Sequence[Cell]) -> Study:
    return Study(
        name,
        about,
        "mlp",
        Settings,
        cells,
        run_cell,
        lambda results, shown: perceptrons(results, shown, name.capitalize()),
        small,
        {"trials": 2, "epochs": 1, "batch": 128, "data": "digits"},
    )


STUDIES = (
    _study(
        "budget",
        "Compare every policy that pays for the wider layer, on every structure of the masks.",
        budget,
        [Cell(c, 4) for c in (CONTINUED, PAPERS, "2:4 input", "4x16 block", "shared partition")],
    ),
    _study(
        "controls",
        "Compare FPE with overlapping children, DropConnect, static sparsity, fresh weights and wider networks.",
        controls,
        [Cell(c, 4) for c in (CONTINUED, PAPERS, OVERLAPPING, DROPCONNECT, STATIC, FRESH, WIDE)],
    ),
    _study(
        "vision-sweep",
        "Sweep widths, alpha and the time of the split; dense networks of more weights beside them.",
        vision,
        [*_few(4), Cell("gram magnitude", 4), Cell(PAPERS, 4, split=0.0)],
    ),
    _study("deep", "Expand every other layer of deep networks with LayerNorm (Table A3).", deep, _few(4, layers=5)),
    _study("hidden", "Expand a pair whose output is as wide as its input.", hidden, _few(8, around=16)),
    _study(
        "rewiring",
        "Let the masks move while training goes on, with random and with gradient regrowth.",
        rewiring,
        [Cell(c, 4, rewire=r) for c in (PAPERS, "4x16 input") for r in ("random", "gradient")],
    ),
)
