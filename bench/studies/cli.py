"""The command ``fpe study``: a command for every study there is."""

import click

from ..cli import ListingGroup
from . import every


class _Studies(ListingGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(every())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = every().get(cmd_name)
        return None if found is None else found.command()


@click.group(cls=_Studies, invoke_without_command=True)
@click.pass_context
def study(context: click.Context) -> None:
    """Run one of the paper's experiments and print it beside the published figures."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
