"""The extra state of a layer: its kind, its sizes and where its edges are, as one int64 tensor.

The topology is not a buffer. Averages of a model (``AveragedModel`` with ``use_buffers=True``, timm's ``ModelEma``)
write to every buffer and to every tensor of ``state_dict()``, and averaged bits would be other masks. The extra state
that they write to is a copy. If a topology was averaged in a checkpoint, its checksum is wrong.

Layout: ``[FORMAT_VERSION, kind, in_features, out_features, four settings of the kind, checksum, topology...]``. If the
topology is one number (a seed) and the last two settings are zero, these two are left out: 64 bytes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fpe.kernels.partition.labels import ROW_BYTES, from_nibbles

FORMAT_VERSION = 3
"""Version of the state dict's layout. Format 2 (topology in entries of its own) is read too."""

SETTINGS = 4
FIXED = 5 + SETTINGS
"""Numbers before the topology."""


class Header(NamedTuple):
    """What a layer is, apart from its edges.

    Attributes:
        kind: Its index in :data:`fpe.layers.KINDS`.
        in_features: Width of the input.
        out_features: Width of the output.
        settings: Four numbers. Of layers with labels: ``alpha``, the structure's index in ``STRUCTURES``, and the two
            sides of a block or zeros. Of block layers: the sides of a block and the planes. Otherwise zeros.
    """

    kind: int
    in_features: int
    out_features: int
    settings: tuple[int, ...] = (0,) * SETTINGS

    def told(self) -> str:
        """What the layer is, in words."""
        from . import KINDS

        name = KINDS[self.kind].__name__ if 0 <= self.kind < len(KINDS) else f"layer of unknown kind {self.kind}"
        return f"a {name} of {self.in_features} inputs, {self.out_features} outputs, settings {self.settings}"


def encode(header: Header, topology: Tensor) -> Tensor:
    """The extra state, int64 on the CPU, from a header and the topology's words (int64)."""
    settings = header.settings[:2] if _is_short(header.settings, topology) else header.settings
    numbers = [FORMAT_VERSION, *header[:3], *settings, int(checksum(topology))]
    return torch.cat([torch.tensor(numbers, dtype=torch.int64, device="cpu"), topology.cpu()])


def _is_short(settings: tuple[int, ...], topology: Tensor) -> bool:
    return len(topology) == 1 and not any(settings[2:])


def decode(state: object, name: str) -> tuple[Header, Tensor]:
    """The header and the topology's words of an extra state.

    Raises:
        ValueError: ``state`` is not an int64 vector, is of another format, or its topology is damaged.
    """
    if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.dim() != 1:
        got = f"{state.dtype} {list(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(
            f"state dict: '{name}' should be the topology of an FPE layer (int64), got {got}; it must be copied as it "
            "is, never averaged or cast"
        )
    if len(state) == FIXED - 1:
        state = torch.cat([state[: FIXED - 3], state.new_zeros(2), state[FIXED - 3 :]])
    numbers, words = state[:FIXED].tolist(), state[FIXED:].cpu()
    if len(numbers) < FIXED or numbers[0] != FORMAT_VERSION:
        raise ValueError(f"state dict: '{name}' should be of format {FORMAT_VERSION}, got {numbers}")
    if int(checksum(words)) != numbers[-1]:
        raise ValueError(f"state dict: '{name}' is damaged: its checksum differs; was it averaged?")
    return Header(numbers[1], numbers[2], numbers[3], tuple(numbers[4:-1])), words


def checksum(words: Tensor) -> Tensor:
    """A number that changes if any one word of the topology changes, int64."""
    return (words * (2 * torch.arange(len(words), device=words.device) + 1)).sum()


def to_words(t: Tensor) -> Tensor:
    """Bytes (uint8) or bits (bool) of any shape as int64 ``[words]`` on the CPU; the last word is padded with zeros."""
    flat = t.cpu().flatten()
    if t.dtype == torch.bool:
        bits = pad(flat, (0, -len(flat) % 64)).view(-1, 8).to(torch.uint8)
        flat = (bits << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(-1, dtype=torch.uint8)
    return pad(flat, (0, -len(flat) % 8)).view(torch.int64)


def to_bits(words: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """A bool tensor of a shape from the words that begin with its bits, and the remaining words.

    Raises:
        ValueError: There are too few words.
    """
    count = torch.Size(shape).numel()
    used = -(-count // 64)
    if len(words) < used:
        raise ValueError(f"expected {used} words of topology for {list(shape)}, got {len(words)}")
    own = words[:used].view(torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")
    return (own & 1).flatten()[:count].view(shape).bool(), words[used:]


def layer_entries(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A layer's entries by their own names, in the present format.

    Format 2 had the weights under ``weight`` or ``values`` and the topology in ``planes``, in ``mask``, or in
    ``block_mask`` and ``inside``.

    Raises:
        ValueError: A state of format 2 lacks its topology, or has another type of it.
    """
    own = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    header = own.get("_extra_state")
    if not isinstance(header, Tensor) or header.dtype != torch.int64 or header.dim() != 1:
        return own
    numbers = header.tolist()[: FIXED - 1]
    if len(numbers) < 4 or numbers[0] != 2 or numbers[1] not in range(4):
        return own
    kind = numbers[1]
    names: dict[str, torch.dtype] = (
        {"planes": torch.uint8}
        if kind < 2
        else {"mask": torch.bool}
        if kind == 2
        else {"block_mask": torch.bool, **({"inside": torch.bool} if "inside" in own else {})}
    )
    words = []
    for name, dtype in names.items():
        t = own.pop(name, None)
        if not isinstance(t, Tensor) or t.dtype != dtype:
            raise ValueError(
                f"state dict: '{prefix}{name}' should be {dtype}, got {getattr(t, 'dtype', type(t).__name__)}"
            )
        if name == "planes":
            if t.dim() != 3 or t.shape[2] % ROW_BYTES:
                raise ValueError(
                    f"state dict: '{prefix}{name}' should have rows of whole {ROW_BYTES} bytes, got {t.shape}"
                )
            t = from_nibbles(t)
        words.append(to_words(t))
    weight = "values" if kind == 3 else "weight"
    if weight in own:
        own["edge_weight"] = own.pop(weight)
    settings = tuple([*numbers[4:], *(0,) * SETTINGS][:SETTINGS])
    own["_extra_state"] = encode(Header(kind, numbers[2], numbers[3], settings), torch.cat(words))
    return own
