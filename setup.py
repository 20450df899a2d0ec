"""Build script.

The checkout keeps ``kernels/`` and ``bench/`` beside ``fpe/``, but neither is installed under its own
name: ``kernels`` is a widely installed package of Hugging Face's. They become ``fpe.kernels`` and
``fpe.bench``.
"""

from setuptools import find_packages, setup

ROOMS = {"fpe": "fpe", "fpe.kernels": "kernels", "fpe.bench": "bench"}

packages = [
    name
    for package, folder in ROOMS.items()
    for name in [package, *(f"{package}.{sub}" for sub in find_packages(folder))]
]

setup(packages=packages, package_dir=ROOMS)
