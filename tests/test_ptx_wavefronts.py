"""The counter of wavefronts, on PTX whose passes are known."""

import numpy as np
import pytest

pytest.importorskip("triton")

from ptx_text import run_on_words

from fpe.bench.lab.ptx.wavefronts import Wavefronts

OWN, TWICE = "ld.global.b32 %r7, [%rd3];", "shl.b32 %r6, %r0, 3;"


@pytest.mark.parametrize(
    ("body", "counted"),
    [
        ("st.shared.b32 [%r4], %r0;", {"shared": 2}),
        (f"{TWICE} add.s32 %r6, %r6, %r3; st.shared.b32 [%r6], %r0;", {"shared": 4}),
        ("shfl.sync.idx.b32 %r7, %r0, 0, 31, -1;", {"shared": 2}),
        ("ld.global.b32 %r7, [%rd1];", {"global": 2}),
        (OWN, {"global": 2}),
        (f"{OWN} ld.global.b32 %r8, [%rd3];", {"global": 2}),
        (f"{OWN} ld.global.b32 %r8, [%rd1];", {"global": 4}),
        (f"{TWICE} cvt.u64.u32 %rd5, %r6; add.s64 %rd5, %rd1, %rd5; ld.global.b32 %r7, [%rd5];", {"global": 4}),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 ld.global.b32 %r7, [%rd3];", {"global": 1}),
    ],
    ids=(
        *("a bank for each lane", "two lanes to a bank", "shuffle", "one word", "a line", "the same load again"),
        *("another load", "two lines", "one warp"),
    ),
)
def test_wavefronts_of_two_warps(body: str, counted: dict[str, int]) -> None:
    watch = Wavefronts(warps=2)
    run_on_words("\t" + body.replace("; ", ";\n\t"), np.arange(128, dtype=np.uint32), watch=watch)
    assert watch.counted == counted


def test_warps_of_the_first_program_alone_are_counted() -> None:
    watch = Wavefronts(warps=1)
    run_on_words("\t" + OWN, watch=watch)
    assert watch.counted == {"global": 1}
