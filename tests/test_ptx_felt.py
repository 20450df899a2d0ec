"""Changes that do something and changes that are none, in PTX written by hand; the mutants drawn from them."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("triton")

from ptx_text import run_on_words

from fpe.bench.lab.ptx import mutate
from fpe.bench.lab.ptx.felt import Change, Watch, live, next_touch
from fpe.bench.lab.ptx.machine import Machine
from fpe.bench.lab.ptx.memory import Fault
from fpe.bench.lab.ptx.parse import Instruction, Kernel

BODY = """
	mov.b32 %r9, 7;
	mov.b32 %r9, 8;
	setp.lt.s32 %p1, %r0, 48;
	setp.lt.s32 %p2, %r0, 100;
	mov.b32 %r10, 0;
	@%p1 ld.global.b32 %r10, [%rd3];
	mov.b32 %r11, 0;
	@%p2 ld.global.b32 %r11, [%rd3];
	add.s32 %r12, %r11, 3;
	ld.global.b32 %r13, [%rd3];
	add.s32 %r14, %r13, %r9;
	sub.s32 %r15, %r10, %r11;
	sub.s32 %r16, %r10, %r10;
	add.s32 %r15, %r15, %r16;
	st.global.b32 [%rd4], %r15;
"""
"""Nobody reads what %r12 and %r14 get, so neither %r9 nor %r13; the guard %p2 is true in all of the 64 threads."""


def executed(body: str, changes_of: object = mutate.changes) -> tuple[Kernel, Watch]:
    watch = Watch(changes_of)  # type: ignore[arg-type]
    run_on_words(body, watch=watch)
    (kernel,) = watch.kernels
    return kernel, watch


def said(kernel: Kernel, changes: list[Change], kind: str) -> set[str]:
    """The instructions that changes of a class are of."""
    return {mutate.words(kernel.instructions[c.at]) for c in changes if c.kind == kind}


def test_only_what_is_felt_is_a_mutant() -> None:
    kernel, watch = executed(BODY)
    (felt,), (tried,) = watch.felt, watch.tried
    assert said(kernel, felt, "predicate widened") == {"setp.lt.s32 %p1, %r0, 48", "@%p1 ld.global.b32 %r10, [%rd3+0]"}
    left_out = said(kernel, tried, "predicate widened") - said(kernel, felt, "predicate widened")
    assert left_out == {"setp.lt.s32 %p2, %r0, 100", "@%p2 ld.global.b32 %r11, [%rd3+0]"}
    assert said(kernel, felt, "fill changed") == {"mov.b32 %r10, 0"}
    assert said(kernel, tried, "fill changed") == {"mov.b32 %r10, 0", "mov.b32 %r11, 0"}
    swapped = {"sub.s32 %r15, %r10, %r11"}  # in the threads where %r10 was not loaded
    assert said(kernel, felt, "registers swapped") == said(kernel, tried, "registers swapped") == swapped
    constants = {words.split(",")[0] for words in said(kernel, tried, "constant changed")}
    assert not constants & {"mov.b32 %r9", "add.s32 %r12", "mov.b32 %r10", "mov.b32 %r11"}


@pytest.mark.parametrize("kind", sorted({"predicate widened", "fill changed", "constant changed", "registers swapped"}))
def test_what_is_left_out_changes_nothing_and_what_is_felt_may(kind: str) -> None:
    _, watch = executed(BODY)
    whole = run_on_words(BODY)
    left_out = [c for c in watch.tried[0] if c not in watch.felt[0] and c.kind == kind]
    for change in left_out:
        assert (run_on_words(BODY, change=lambda given, c=change: mutate.changed(given, c.at, c.after)) == whole).all()
    results = []
    for change in (c for c in watch.felt[0] if c.kind == kind):
        try:
            results.append(run_on_words(BODY, change=lambda given, c=change: mutate.changed(given, c.at, c.after)))
        except Fault as fault:
            results.append(fault)
    assert any(isinstance(r, Fault) or (r != whole).any() for r in results)


def test_watching_changes_nothing() -> None:
    _, watch = executed(BODY)
    assert (run_on_words(BODY, watch=Watch(mutate.changes)) == run_on_words(BODY)).all() and watch.felt[0]


def test_what_becomes_of_a_register() -> None:
    kernel, _ = executed(BODY)
    at = {mutate.words(i): place for place, i in enumerate(kernel.instructions)}
    assert next_touch(kernel, at["mov.b32 %r9, 7"]) == (at["mov.b32 %r9, 8"], "written")
    assert next_touch(kernel, at["mov.b32 %r10, 0"]) == (at["@%p1 ld.global.b32 %r10, [%rd3+0]"], "filled")
    assert next_touch(kernel, at["mov.b32 %r9, 8"]) == (at["add.s32 %r14, %r13, %r9"], "read")
    assert next_touch(kernel, at["add.s32 %r12, %r11, 3"]) is None
    assert {"%r10", "%r11", "%r15", "%r16", "%p1", "%rd3", "%r0"} <= live(kernel)
    assert live(kernel).isdisjoint({"%r9", "%r12", "%r13", "%r14"})


def test_a_change_that_cannot_be_assembled_is_none() -> None:
    def changes(kernel: Kernel) -> list[Change]:
        place = next(p for p, i in enumerate(kernel.instructions) if i.opcode == "sub.s32")
        other: Instruction = replace(kernel.instructions[place], opcode="sub.s64")
        unknown = replace(kernel.instructions[place], opcode="sub.rz.sat.s32")
        return [Change("operation exchanged", place, after, place) for after in (other, unknown)]

    _, watch = executed(BODY, changes)
    assert len(watch.tried[0]) == 2 and watch.felt[0] == []


def test_an_outcome_leaves_the_state_alone() -> None:
    seen = []

    def look(state: Machine, instruction: Instruction, here: np.ndarray | None) -> None:
        if instruction.opcode == "sub.s32":
            before = dict(state.registers)
            (values,) = state.outcome(instruction, here)
            assert before.keys() == state.registers.keys()
            assert all(before[name] is state.registers[name] for name in before)
            seen.append(values)

    got = run_on_words(BODY, watch=look)
    assert len(seen) == 2 and (seen[0].reshape(-1).astype(np.uint32) == got).all()
