"""The list of commands. A command's modules, and PyTorch with them, are imported when it is called."""

from importlib import import_module

import click

COMMANDS = {
    "docs": ("cli.commands:docs", "Fill the tables and figures of README.md and docs/ from the committed results."),
    "doctor": (
        "cli.doctor:doctor",
        "Say what runs here and what does not, and why, and which data are found.",
    ),
    "explain": (
        "cli.costs:explain_command",
        "Say which implementation runs an expanded layer, what each would cost, and why (predicted).",
    ),
    "gpus": ("cli.costs:gpus_command", "Print the GPUs that --gpu knows, by the name it takes."),
    "gpu": (
        "cli.costs:gpu_command",
        "Measure everything that needs a GPU, in minutes: correctness first, then times (--help says more).",
    ),
    "here": (
        "here.cli:here",
        "Measure this CPU, and an expanded layer on it beside its dense parent and the wide layer (half a minute).",
    ),
    "lab": (
        "lab.cli:lab",
        "Check the kernels without a GPU: compile them, execute them, count their memory traffic.",
    ),
    "latency": (
        "cli.costs:latency_command",
        "Time expanded layers beside the parent, the wide dense layer and peers, here and now.",
    ),
    "report": (
        "cli.commands:report",
        "Run the case studies and write one HTML page with their figures (minutes on two cores).",
    ),
    "results": (
        "cli.commands:results_command",
        "Print a committed results file by its name, or any by its path.",
    ),
    "study": ("studies.cli:study", "Run one of the paper's experiments and print it beside the published figures."),
    "tune": (
        "cli.commands:tune_command",
        "Find the fastest tiles of the block and partition kernels on the GPU at hand.",
    ),
    "verdict": (
        "cli.costs:verdict_command",
        "Say up to which batch size an expanded layer costs as much as its dense parent, and what to use above it.",
    ),
}
"""Where each command is, and the sentence that the list of commands shows of it, which is the first of its own help."""


class ListingGroup(click.Group):
    """A group whose list of commands shows the whole first sentence of each, however many lines it takes."""

    def about(self, ctx: click.Context, name: str) -> str:
        """What the list says of a command."""
        command = self.get_command(ctx, name)
        return f"{command.get_short_help_str(limit=1000).removesuffix('.')}." if command else ""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.about(ctx, name)) for name in self.list_commands(ctx)])


class LazyGroup(ListingGroup):
    """A group that imports a command when it is called, and not to list it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in alphabetical order."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        return getattr(import_module(f"..{module}", __package__), attribute)

    def about(self, ctx: click.Context, name: str) -> str:
        """What the list says of a command, without importing it."""
        return COMMANDS[name][1]


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="fixed-parameter-expansion", prog_name="fpe")
@click.pass_context
def cli(context: click.Context) -> None:
    """Fixed Parameter Expansion: wider networks at the same number of non-zero weights.

    Start with 'fpe doctor', which says what runs here, and 'fpe report', which runs the case studies and writes a page
    to look at.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
