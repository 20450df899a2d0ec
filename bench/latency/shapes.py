"""The shapes and batch sizes that are measured."""

LLM = """
8192x29568 4096x4096 32000x5120 32000x8192 28672x8192 5120x5120 5120x13824 3584x20480 4096x11008 13824x5120 8192x8192
18944x3584 14336x4096 4096x14336 8192x28672 11008x4096 32000x4096 20480x3584 3584x18944 21504x7168 7168x7168 28672x7168
7168x28672 27648x9216 9216x9216 36864x9216 9216x36864 36864x12288 12288x12288 49152x12288 12288x49152
"""
"""Linear layers of language models, ``N x K``: those that published decode kernels share."""


def parse(text: str) -> tuple[int, int]:
    """Reads ``"4096x14336"`` as ``(N, K)``.

    Raises:
        ValueError: It is no such pair.
    """
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise ValueError(f"expected output x input features as in 4096x14336, got {text!r}")
    return int(n), int(k)


SETS: dict[str, tuple[tuple[int, int], ...]] = {
    "headline": ((4096, 14336), (14336, 4096)),  # Llama-3-8B's MLP
    "llm": tuple(parse(word) for word in LLM.split()),
    "vision": ((3072, 768), (768, 3072), (4096, 1024), (1024, 4096)),  # ViT-B and GPT-2, ViT-L
    "paper": ((8, 512), (32, 512), (128, 512)),  # hidden layers on 512 features
    "tiny": ((96, 128),),
}
"""Shapes ``(N, K)`` of the parent by the name of their set."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Batch sizes."""
KEY_ROWS = (1, 16, 64, 256, 1024, 8192)
"""Those that a short run measures."""


def find(name: str) -> tuple[tuple[int, int], ...]:
    """The shapes of a set, or the one that is written out.

    Raises:
        ValueError: It is neither.
    """
    if name in SETS:
        return SETS[name]
    try:
        return (parse(name),)
    except ValueError as error:
        raise ValueError(f"{error}; sets are {', '.join(SETS)}") from error
