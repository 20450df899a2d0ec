"""Stands for a compiler in a process of its own; it imports nothing, so that the process starts quickly."""

import os


def compile_by_number(job: str, config: int, device: str, tf32: bool) -> str:
    """Dies at 3, refuses odd numbers."""
    if config == 3:
        os._exit(1)
    return f"odd for {job} on {device}" * (config % 2)
