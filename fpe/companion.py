"""Registers expansion as a quantizer of transformers, whichever of the two packages is imported first.

transformers keeps its registry of quantizers in a module. Once that is imported, :mod:`fpe.models.hugging_face` is
imported too and enters our quantizer there. Until then nothing of transformers is imported.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

REGISTRY = "transformers.quantizers.auto"
OURS = "fpe.models.hugging_face"


class _Waiting(MetaPathFinder):
    """Finds the registry as Python would, and has our module imported after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module

            def run_both(module: ModuleType) -> None:
                run(module)
                import_module(OURS)

            loader.exec_module = run_both
        return spec


def accompany() -> None:
    """Registers the quantizer: now if the registry is imported already, otherwise when it will be."""
    if REGISTRY in sys.modules:
        import_module(OURS)
    else:
        sys.meta_path.insert(0, _Waiting())


def note_expansion(model: Any) -> None:
    """Marks an expanded model, so that ``from_pretrained`` recognises what ``save_pretrained`` writes."""
    if OURS in sys.modules:
        sys.modules[OURS].note_expansion([model])
