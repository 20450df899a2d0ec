"""From full opcode to handler, for an architecture."""

from .machine import Handler


def table(arch: int) -> dict[str, Handler]:
    """The handlers of an architecture, as 80 or 90, by full opcode.

    What is missing is not executed by guess: :class:`~.machine.UnknownOpcode` names it.
    """
    from . import floats, integers, matrix, movement

    return {**integers.HANDLERS, **floats.HANDLERS, **movement.HANDLERS, **matrix.HANDLERS}
