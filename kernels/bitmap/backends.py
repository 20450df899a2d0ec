"""What runs the bitmap operations, and what keeps each from a call."""

from ..dispatch import Backend, why_not_triton

BACKENDS = {"triton": Backend("bitmap.triton", "", why_not_triton), "eager": Backend("bitmap.eager", "")}
"""``why_not`` takes an operand."""
