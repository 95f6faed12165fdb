"""Reading machine code: what of it may run before a kernel has waited for the ones ahead of it."""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
WAIT = "ACQBULK"
# What touches memory that other kernels may write: loads, stores, atomics and asynchronous copies, of global memory or
# of what may be global. Constants (arguments), shared and local memory are a kernel's own.
_TOUCHES = re.compile(r"(LD|LDG|LDGSTS|LDGMC|ST|STG|RED|REDG|ATOM|ATOMG|UTMALDG|UTMASTG|UTMAREDG|UBLKCP|UBLKRED)$")
# Jumps whose targets are not in the text.
_BLIND = ("BRX", "BRXU", "JMX", "JMXU", "JMP", "CALL.ABS")


def before_wait(code: str) -> list[str]:
    """Instructions that touch other kernels' memory, or end the program, and can be reached from its beginning without
    passing the wait, in the listing of one kernel: all ways through its jumps are gone. Without a wait, all of them."""
    found = [(int(address, 16), guard, name, operands) for address, guard, name, operands in _INSTRUCTION.findall(code)]
    assert found, "no instructions in what cuobjdump printed"
    index = {address: number for number, (address, *_) in enumerate(found)}
    reached: set[int] = set()
    ahead, reasons = [0], []
    while ahead:
        number = ahead.pop()
        if number in reached or number >= len(found):
            continue
        reached.add(number)
        _, guard, name, operands = found[number]
        kind = name.split(".")[0]
        if kind == WAIT and not guard:
            continue
        if _TOUCHES.match(kind) or kind == "EXIT" or name.startswith(_BLIND):
            reasons.append(f"@{guard} {name}" if guard else name)
        target = _TARGET.search(operands)
        # Of calls and of places to meet again (BSSY) also what comes next.
        if target and kind in ("BRA", "BSSY", "CALL", "WARPSYNC", "BREAK") and int(target[1], 16) in index:
            ahead.append(index[int(target[1], 16)])
        ends = kind in ("EXIT", "BRA", "RET", "KILL") and not guard and not _condition(operands)
        if not ends:
            ahead.append(number + 1)
    return reasons


def instructions(code: str) -> str:
    """The instructions of a listing, one a line, without what the compilers note beside them."""
    return "\n".join(" ".join(parts) for parts in _INSTRUCTION.findall(code))


def _condition(operands: str) -> bool:
    """Whether a branch has one of its own, beside its guard: `BRA.U UP0, 0x...`, `BRA.DIV UR4, 0x...`."""
    return "," in operands
