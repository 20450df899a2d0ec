"""Expanded models as files: safetensors, whose JSON header says what is in them."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .layers import FORMAT_VERSION, ExpandedLinear

Place = str | PathLike[str]


def save(model: nn.Module, path: Place) -> None:
    """Writes an expanded model as one file of safetensors, for :func:`fpe.restore`.

    Tensors that the model shares are written once. The header names the format and the expanded layers: with
    ``safetensors.safe_open(path, "pt").metadata()`` that is known without reading a tensor.

    Args:
        model: Any module with expanded layers.
        path: The file.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: ``model`` is not a module.
        ValueError: ``model`` has no expanded layer, or a tensor of its state dict is on ``"meta"`` or sharded.

    Example:
        >>> wide = fpe.expand(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)))
        >>> fpe.save(wide, "wide.safetensors")
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> fpe.nonzeros(fpe.restore(model, "wide.safetensors"))
        160
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: model must be an nn.Module, got {type(model).__name__}")
    layers = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, ExpandedLinear)}
    if not layers:
        raise ValueError("save: the model has no expanded layer; save its state_dict() as that of any model")
    entries: dict[str, Tensor] = {}
    seen: set[Any] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or value.is_meta or hasattr(value, "full_tensor"):
            raise ValueError(
                f"save: '{name}' must be a tensor with values, got {_kind(value)}; load or gather it first"
            )
        if id(value) not in seen:
            entries[name] = value.detach().contiguous()
        seen.add(id(value))
    header = {"format": "pt", "fpe": json.dumps({"version": FORMAT_VERSION, "layers": layers})}
    _safetensors().torch.save_file(entries, Path(path), metadata=header)


def _kind(value: object) -> str:
    return "one on 'meta'" if isinstance(value, Tensor) and value.is_meta else f"a {type(value).__name__}"


def load(path: Place) -> dict[str, Tensor]:
    """The state dict of a file that :func:`save` wrote.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: There is no such file.
        ValueError: The file is not one that :func:`save` wrote.
    """
    files = _safetensors()
    try:
        with files.safe_open(Path(path), framework="pt") as opened:
            header = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except files.SafetensorError as error:
        raise ValueError(f"restore: '{path}' is no file of safetensors: {error}") from error
    if "fpe" not in header:
        raise ValueError(f"restore: '{path}' was not written by fpe.save: its header has no 'fpe'")
    return state


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("fpe.save and fpe.restore of a file need safetensors: pip install safetensors") from error
    return safetensors
