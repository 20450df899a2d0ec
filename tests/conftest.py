"""Settings of the whole suite: one thread, Triton's interpreter, property tests that try the same examples."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read by Triton as a kernel is defined; tests that compile use a subprocess

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile(
    "fpe",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fpe")
