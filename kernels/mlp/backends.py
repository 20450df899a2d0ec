"""What runs the expanded MLP in one launch; without a launch of its own it is two operations."""

from ..dispatch import Backend, why_not_triton

BACKENDS = {"triton": Backend("mlp.triton", "", why_not_triton), "eager": Backend("mlp.eager", "")}
"""``why_not`` takes an operand and the reason why the kernel rejects the call's sizes, if there is one."""
