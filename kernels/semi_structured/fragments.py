"""A 2:4 weight in the order in which ``mma.sp`` m16n8k32 takes it.

Source: PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types" and "Sparse matrix storage".

A lane ``4 * g + t`` holds of a 16 x 32 tile the quads ``t`` and ``t + 4`` of the rows ``g`` and ``g + 8``, a register
each. Metadata comes from two of every four lanes, chosen by a selector: with selector 0 lane ``4 * g + c`` holds the
codes of quads ``4 * c .. 4 * c + 3`` of row ``g`` in its low half and of row ``g + 8`` in its high half; selector 1
takes the same from lane ``4 * g + 2 + c``. So one register in each lane serves a tile of 32 rows.

With labels of a seed the kernel computes the metadata, and the order of rows and inputs follows the bits of a hash. A
hash serves two neighbouring rows and, of the 64 pairs of 128 inputs, the pairs ``16 s + 4 t + i`` of one ``t``: bit
``8 i + 2 s`` is for the even row, the next bit for the odd one. Rows ``2 g`` and ``2 g + 1`` of 16 become ``g`` and
``g + 8``. An instruction takes the pairs of one ``t``. Pair ``16 s + 4 t + i`` belongs to quad ``2 i + s // 2``, whose
first pair it is for an even ``s``, and whose second for an odd one.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..partition.seeded import SeededLabels
from .layout import CODES, SemiStructuredLayout

TILE_ROWS = 128
"""Outputs that a program of the kernel takes; weights are padded to a multiple of it."""
TILE_QUADS = 16
"""Quads of a step of the kernel; weights are padded to a multiple of it."""
OF_A_HASH = 128
"""Inputs of a neuron that four hashes serve; with labels of a seed, weights are padded to a multiple of it."""


class Fragments(NamedTuple):
    """A weight ready for sparse tensor cores.

    Attributes:
        weights: int32 ``[children, tiles, instructions, 2, 32, 4]``: tiles of 32 rows, instructions of 32 inputs,
            halves of a tile, lanes, registers.
        metadata: int32 ``[tiles, instructions, 32]``, the first child's; none with labels of a seed.
    """

    weights: Tensor
    metadata: Tensor | None


def pack(values: Tensor, codes: Tensor) -> Fragments:
    """Brings 16-bit values ``[children, N, 2 * quads]`` and codes ``[N, ceil(quads / 2)]`` into fragment order."""
    return Fragments(pack_weights(values), pack_metadata(codes, values.shape[2] // 2))


def pack_weights(values: Tensor) -> Tensor:
    """The weights of :func:`pack`: the definition of :func:`fpe.kernels.semi_structured.pack.pack_values`."""
    children, n, width = values.shape
    rows, quads = -n % TILE_ROWS, -(width // 2) % TILE_QUADS
    pairs = pad(values.contiguous().view(torch.int32), (0, quads, 0, rows))
    tiles = pairs.view(children, -1, 2, 2, 8, pairs.shape[2] // 8, 2, 4)  # tile, half, row + 8, g, instruction, r, t
    return tiles.permute(0, 1, 5, 2, 4, 7, 6, 3).reshape(children, tiles.shape[1], -1, 2, 32, 4)


def pack_metadata(codes: Tensor, quads: int) -> Tensor:
    """The metadata of :func:`pack`, int32 ``[tiles, instructions, 32]``, for rows of so many quads."""
    rows, width = -codes.shape[0] % TILE_ROWS, quads + -quads % TILE_QUADS
    codes = pad(codes, (0, width // 2 - codes.shape[1], 0, rows), value=CODES[0] * 17)
    chunks = codes.contiguous().view(torch.int16).view(-1, 2, 2, 8, width // 8, 2)
    metadata = chunks.permute(0, 4, 3, 1, 5, 2).contiguous().view(torch.int32)  # tile, instruction, g, half, chunk
    return metadata.reshape(*metadata.shape[:2], 32)


def pack_seeded(w: Tensor, labels: SeededLabels) -> Tensor:
    """The shares of two children of a seed in a parent's weight ``[N, K]`` of 16-bit floats, in fragment order.

    Returns:
        int32 ``[2, tiles, instructions, 2, 32, 4]``, as :attr:`Fragments.weights`.
    """
    n, k = w.shape
    rows, columns = n + -n % TILE_ROWS, k + -k % OF_A_HASH
    halves = pad(w, (0, columns - k, 0, rows - n)).view(torch.int16).unflatten(1, (-1, 2))
    turned = labels._replace(shape=(rows, columns)).unpack(w.device)[:, ::2, None] != 0
    first = torch.where(turned, halves.flip(-1), halves)  # of each pair the first child's value, then the second's
    tiles = first.view(-1, 2, 8, 2, columns // OF_A_HASH, 2, 2, 4, 2, 2, 2)
    # tile, half, g, row + 8, group, s // 2, s % 2, t, i // 2, i % 2, child
    ordered = tiles.permute(10, 0, 4, 7, 1, 2, 9, 5, 8, 3, 6).contiguous()
    return ordered.view(torch.int32).reshape(2, rows // 32, columns // 32, 2, 32, 4)


def unpack(fragments: Fragments, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, SemiStructuredLayout]:
    """The values and layout that :func:`pack` was given; the fragments must have metadata.

    Args:
        fragments: The packed weight.
        n: Outputs.
        k: Inputs.
        dtype: Type of the values.
    """
    assert fragments.metadata is not None
    children, tiles, instructions = fragments.weights.shape[:3]
    quads = -(-k // 4)
    pairs = fragments.weights.view(children, tiles, instructions, 2, 8, 4, 2, 2).permute(0, 1, 3, 7, 4, 2, 6, 5)
    pairs = pairs.reshape(children, tiles * 32, instructions * 8)[:, :n, :quads].contiguous()
    chunks = fragments.metadata.view(tiles, instructions, 8, 2, 2, 1).view(torch.int16)
    codes = chunks.permute(0, 3, 5, 2, 1, 4).reshape(tiles * 32, -1).contiguous().view(torch.uint8)
    return pairs.view(dtype), SemiStructuredLayout((n, k), codes[:n, : -(-quads // 2)].contiguous(), None, children)
