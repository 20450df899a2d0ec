"""From full opcode to handler, for an architecture."""

from ....kernels.gpus import architecture
from . import blackwell, floats, hopper, integers, matrix, movement
from .machine import Handler


def table(arch: int) -> dict[str, Handler]:
    """The handlers of an architecture, as 80 or 90, by full opcode.

    What is missing is not executed by guess: :class:`~.machine.UnknownOpcode` names it.
    """
    handlers = {**integers.HANDLERS, **floats.HANDLERS, **movement.HANDLERS, **matrix.HANDLERS}
    if arch >= 90:
        handlers |= hopper.STMATRIX
    if architecture(arch).matrix == "wgmma":
        handlers |= hopper.HANDLERS
    if architecture(arch).matrix == "tcgen05.mma":
        handlers |= blackwell.HANDLERS
    return handlers
