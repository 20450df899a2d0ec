"""What runs the expanded MLP in one launch; without a launch of its own it is two operations."""

from ..dispatch import Backend, why_not_triton

BACKENDS = {"triton": Backend("mlp.triton", "", why_not_triton), "eager": Backend("mlp.eager", "")}
"""``why_not`` takes an operand and what of the call the kernel does not take, in words."""
