"""The command ``fpe study``: a command for every study there is."""

import click

from . import every


class _Studies(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(every())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = every().get(cmd_name)
        return None if found is None else found.command()


@click.group(cls=_Studies)
def study() -> None:
    """Run one of the paper's experiments and print it beside the published figures."""
