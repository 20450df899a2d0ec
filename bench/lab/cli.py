"""``fpe lab``: what can be proved of the kernels with no GPU. What a command needs is imported when it runs."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from ...kernels.structures import STRUCTURES, TWO_FOUR
from ..cli import ListingGroup
from ..cli.options import (
    ROWS_HELP,
    STRUCTURE_HELP,
    Number,
    alpha_option,
    block_option,
    dtype_option,
    jobs_option,
    one_job_option,
    output_option,
    rows_options,
    shape_option,
)

OPERATIONS = (
    *("forward", "dx", "dw", "split", "merge", "grad", "split_t", "merge_t", "grad_t", "mlp", TWO_FOUR),
    *("unpack", "pack", "kept_split", "kept_merge", "kept_grad", "kept_split_t", "kept_merge_t", "kept_grad_t"),
)


ARCH_HELP = "Compute capability, as 90."
operations_option = click.option(
    "--op",
    "operations",
    type=click.Choice(OPERATIONS, case_sensitive=False),
    multiple=True,
    metavar="OPERATION",
    help=f"Any of {', '.join(OPERATIONS)}.  [default: all]",
)


@click.group(cls=ListingGroup, invoke_without_command=True)
@click.pass_context
def lab(context: click.Context) -> None:
    """Check the kernels without a GPU: compile them, execute them, count their memory traffic."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@lab.command("compile")
@click.option("--arch", "architectures", type=int, multiple=True, help=f"{ARCH_HELP}  [default: all]")
@operations_option
@click.option("--quick", is_flag=True, help="A few cases of each kind (under a minute on two cores).")
@click.option("--all", "show_all", is_flag=True, help="Print every row, not only the worst and those complained of.")
@jobs_option
@rows_options
@output_option("out/lab")
def compile_command(
    architectures: tuple[int, ...],
    operations: tuple[str, ...],
    quick: bool,
    show_all: bool,
    jobs: int | None,
    form: str | None,
    output: Path,
) -> None:
    """Compile every shipped configuration and check the machine code.

    Complaints, and an exit status of 1: spills, too much shared memory, loads of the weights narrower than 128 bits,
    or another matrix instruction than the one meant. The first run takes a while; binaries are kept in Triton's cache.
    Rows of 2:4 kernels go to a file of their own. A file of the same version of Triton keeps its rows of other
    architectures and operations.
    """
    from ..cli.output import finish, print_rows
    from ..families import CASES, QUICK
    from ..report.summary import compiled
    from . import compile as compiler

    _compilable(architectures)
    cases = _chosen(QUICK if quick else CASES, operations)
    rows, joined = [], []
    for name, chosen in compiler.by_file(cases).items():
        results = compiler.run(chosen, architectures or compiler.ARCHITECTURES, jobs, _bar("Compiling", bool(form)))
        shown = compiler.table(results, show_all) if name == "compile" else compiled(results)
        file = output / f"{name}.jsonl"
        kept = compiler.joined(file, results, operations)
        if form:
            kept.write(file)
            joined += [{"study": kept.study, **row} for row in kept.rows]
        else:
            finish(kept, file, shown, form)
        rows += results.rows
    if form:
        print_rows(joined, form)
    bad = [row for row in rows if row["complaints"]]
    if bad:
        first = f"{bad[0]['case']} on sm_{bad[0]['arch']}: {'; '.join(bad[0]['complaints'])}"
        raise click.ClickException(f"{len(bad)} of {len(rows)} binaries are not as meant; the first: {first}")


@lab.command("ladder")
@rows_options
@output_option("out/lab")
def ladder_command(form: str | None, output: Path) -> None:
    """Count machine instructions of plain ways to apply labels and to place kept values, up to what is shipped."""
    from ...kernels.device import interpreting
    from ..cli.output import finish, print_table

    if interpreting():
        raise click.ClickException("kernels are interpreted where TRITON_INTERPRET=1; unset it to compile them")
    from ..report import summary
    from . import ladder

    results = ladder.run()
    finish(results, output / "ladder.jsonl", summary.ladder(results), form)
    if not form:
        print_table(summary.ladder(results, kept=True))


@lab.command("headline")
@click.option("--arch", type=int, default=90, show_default=True, help=ARCH_HELP)
@one_job_option
@rows_options
@output_option("out/lab")
def headline_command(arch: int, jobs: int, form: str | None, output: Path) -> None:
    """Compile what the first steps of `fpe gpu` launch, and take the time of each binary.

    The plan of `fpe gpu` uses the committed rows. They were measured with an empty cache: set TRITON_CACHE_DIR to an
    empty folder.
    """
    import triton

    from ...kernels.device import KNOWN
    from ..cli.output import finish
    from ..gpu import plan, warm
    from ..gpu.cli import planning
    from ..report.summary import compile_times
    from ..results import Results

    _compilable([arch])
    rows = warm.compile_all(plan.kernels_first(planning()), arch, KNOWN[arch], jobs)
    results = Results("lab-headline-compile", {"triton": triton.__version__, "arch": arch}, rows)
    finish(results, output / "headline-compile.jsonl", compile_times(results), form)


@lab.command("traffic")
@click.option("--m", multiple=True, type=click.IntRange(1), help=f"{ROWS_HELP}  [default: 1 to 8192]")
@shape_option(None, "an LLM's MLP")
@alpha_option(1)
@click.option(
    "--structure", type=click.Choice(STRUCTURES), help=f"{STRUCTURE_HELP}  [default: all; block with --block]"
)
@block_option(None)
@click.option(
    "--kept",
    multiple=True,
    type=Number(0, 1),
    help="Share of the entries that exist, stored as packed values; in 32nds. May be given several times.",
)
@click.option("--dropped", type=Number(0, 1), default=0.0, show_default=True, help="Share of blocks dropped.")
@dtype_option(("bf16", "fp16", "fp32"))
@click.option("--l2", type=Number(0), default=50.0, show_default=True, help="Megabytes of L2.")
@click.option("--group", type=click.IntRange(1), help="Try another grouping of the programs.")
@click.option("--quick", is_flag=True, help="Small layers, to see that it runs.")
@rows_options
@output_option("out/lab")
def traffic_command(
    m: tuple[int, ...], l2: float, group: int | None, form: str | None, output: Path, **sizes: Any
) -> None:
    """Count the bytes that every operation asks for, touches, and moves through a simulated L2 to DRAM."""
    from rich.console import Console

    from ..cli.output import finish
    from . import traffic

    cases = traffic.cases_of(m, **sizes)
    with Console(stderr=True, quiet=bool(form)).status("Simulating") as status:
        results = traffic.run(
            cases, l2=l2 * 1e6, group=group, report=lambda row: status.update(f"{row['op']} {row['M']} done")
        )
    finish(results, output / "traffic.jsonl", traffic.table(results), form)


@lab.command("hazards")
@click.option("--arch", "architectures", type=int, multiple=True, help=f"{ARCH_HELP}  [default: 90 and 100]")
@operations_option
@click.option("--kernels", default="shipped", show_default=True, help="A name for the kernels, written to every row.")
@jobs_option
@rows_options
@output_option("out/lab")
def hazards_command(
    architectures: tuple[int, ...],
    operations: tuple[str, ...],
    kernels: str,
    jobs: int | None,
    form: str | None,
    output: Path,
) -> None:
    """Search the machine code for races of asynchronous instructions.

    An exit status of 1: registers that are touched while a matrix instruction may still use them, shared memory read
    before its barrier or fence, tensor memory read before its wait, matrix instructions that the assembler serialised.
    Every `fpe lab compile` makes the same search; this one prints what it finds by operation. A file that exists keeps
    its rows of other versions of Triton, other kernels, architectures and operations.
    """
    from ..cli.output import finish
    from . import survey

    _compilable(architectures)

    results = survey.run(
        architectures or survey.ARCHITECTURES, operations, kernels, jobs, _bar("Compiling", bool(form))
    )
    file = output / "hazards.jsonl"
    finish(survey.joined(file, results, operations), file, survey.table(results), form)
    bad = [row for row in results.rows if row["hazards"]]
    if bad:
        first = f"{bad[0]['case']} on sm_{bad[0]['arch']}: {bad[0]['first_hazard']}"
        raise click.ClickException(f"{len(bad)} of {len(results.rows)} binaries have hazards; the first: {first}")


@lab.command("execute")
@click.option("--arch", "architectures", type=int, multiple=True, help=f"{ARCH_HELP}  [default: all]")
@operations_option
@click.option("--quick", is_flag=True, help="A case of each kind.")
@jobs_option
@rows_options
@output_option("out/lab")
def execute_command(
    architectures: tuple[int, ...],
    operations: tuple[str, ...],
    quick: bool,
    jobs: int | None,
    form: str | None,
    output: Path,
) -> None:
    """Execute the compiled PTX in NumPy, on small operands, and compare it with the eager twins.

    Memory, registers and asynchronous operations are checked while it runs. An exit status of 1: a fault, an
    instruction that is not known, or a result that differs.
    """
    from ..cli.output import finish, print_table
    from .ptx import cases, execute

    chosen = _chosen(cases.QUICK if quick else cases.CASES, operations)
    _compilable(architectures)
    wrong = []
    for name, own in execute.by_file(chosen).items():
        results = execute.run(own, architectures or execute.ARCHITECTURES, jobs, _bar("Executing", bool(form)))
        finish(results, output / f"{name}.jsonl", execute.table(results), form)
        bad = execute.complaints(results)
        if bad.rows:
            wrong.append(bad.title)
            if not form:
                print_table(bad)
    if wrong:
        raise click.ClickException("; ".join(wrong))


@lab.command("wavefronts")
@rows_options
@output_option("out/lab")
def wavefronts_command(form: str | None, output: Path) -> None:
    """Count the passes of L1 and shared memory that a product of kept values costs, by density."""
    from ..cli.output import finish
    from ..report import summary
    from .ptx import wavefronts

    _compilable(())
    results = wavefronts.run((80, 86, 89, 90))
    finish(results, output / "wavefronts.jsonl", summary.wavefronts(results), form)


@lab.command("mutate")
@click.option(
    "--arch", "architectures", type=int, multiple=True, default=(80, 90, 100), show_default=True, help=ARCH_HELP
)
@click.option(
    "--most",
    type=click.IntRange(1),
    default=6,
    show_default=True,
    help="Largest number of mutants of a class and case.",
)
@operations_option
@jobs_option
@rows_options
@output_option("out/lab")
def mutate_command(
    architectures: tuple[int, ...],
    most: int,
    operations: tuple[str, ...],
    jobs: int | None,
    form: str | None,
    output: Path,
) -> None:
    """Break the compiled kernels on purpose and count what `fpe lab execute` would have seen.

    A file that exists keeps its rows of other architectures and operations.
    """
    from ..cli.output import finish
    from .ptx import mutate

    chosen = _chosen(mutate.CASES, operations, "fpe lab mutate")
    _compilable(architectures)
    results = mutate.run(chosen, architectures, most, jobs, _bar("Mutating", bool(form)))
    file = output / "mutation.jsonl"
    finish(mutate.joined(file, results, chosen), file, mutate.table(results), form)


def _bar(title: str, quiet: bool) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """Shows on standard error how far rows have come."""
    from rich.console import Console
    from rich.progress import track

    return lambda rows, total: track(rows, title, total, console=Console(stderr=True, quiet=quiet))


def _chosen(cases: Sequence[Any], operations: tuple[str, ...], whose: str = "--quick") -> list[Any]:
    """The cases of some operations, of all of them without one; raises where those of ``whose`` have none."""
    found = [case for case in cases if case.option in (operations or (case.option,))]
    if not found:
        raise click.BadParameter(f"{whose} has no case of {', '.join(operations)}", param_hint="'--op'")
    return found


def _compilable(architectures: Iterable[int]) -> None:
    """Refuses architectures that are not known, and the interpreter."""
    from ...kernels.device import KNOWN, interpreting

    if interpreting():
        raise click.ClickException("kernels are interpreted where TRITON_INTERPRET=1; unset it to compile them")
    unknown = set(architectures) - set(KNOWN)
    if unknown:
        known = ", ".join(map(str, KNOWN))
        raise click.BadParameter(f"expected some of {known}, got {min(unknown)}", param_hint="'--arch'")
