"""Reads what the TPU's compiler writes about memory before it generates code.

The buffers are settled in the first tenth of the time that a compilation takes.
"""

import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

ALLOCATION = re.compile(r"allocation \d+: size (\d+),(.*)")
VALUE = re.compile(
    r" value: <\d+ (\S+?)(\{[\d,]*\})?(?: \(phi\))? @(\d+)> \(size=(\d+),offset=(\d+)\)"
)
LIFE = re.compile(r"^    (\S+?)(\{[\d,]*\})?:(\d+)-(\d+)$", re.M)
HBM = 0


def writing_to(folder: str) -> dict[str, str | bool]:
    """Options of `compile` with which the compiler writes what it makes into a folder.

    `as_text()` of the result raises for some programs (libtpu 0.0.52: "async-update instruction
    should have 1 operands"); this does not.
    """
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


class Buffers(NamedTuple):
    """Bytes of HBM on each device. reserved: with the gaps between buffers, which the compiler
    compares to what there is. peak: of the buffers alive at once, as `memory_analysis()` says."""

    reserved: int
    peak: int


class Life(NamedTuple):
    """When a value is alive, by the schedule, and the bytes of its allocation that it takes."""

    first: int
    last: int
    begin: int
    end: int


def is_accepted(folder: str) -> bool:
    """Whether the compiler has settled all buffers, and found room for them."""
    return any(pathlib.Path(folder).glob("*.after_optimizations_after_buffer_assignment.txt"))


def read_buffers(folder: str) -> Buffers:
    """What was written to the folder about a program, accepted or refused."""
    files = pathlib.Path(folder)
    (assigned,) = files.glob("*.after_optimizations-buffer-assignment.txt")
    (lives,) = files.glob("*.after_optimizations-live-range.txt")
    ranges = {
        (match[1], match[2] or "{}"): (int(match[3]), int(match[4]))
        for match in LIFE.finditer(lives.read_text().partition("BufferLiveRange:")[2])
    }
    always, reserved, values = 0, 0, []
    for size, kind, lines in _allocations(assigned.read_text()):
        if not lines or int(lines[0][3]) != HBM:
            continue
        reserved += 0 if "thread-local" in kind else size
        if "preallocated-temp" not in kind:
            always += 0 if "thread-local" in kind else size
            continue
        for line in lines:
            life = ranges.get((line[1], line[2] or "{}"))
            if life is not None:
                values.append(Life(*life, int(line[5]), int(line[5]) + int(line[4])))
    times = {value.first for value in values}
    return Buffers(reserved, always + max((_alive(values, time) for time in times), default=0))


def _allocations(text: str) -> Iterator[tuple[int, str, list[re.Match]]]:
    """Size, description and values of each allocation."""
    for block in re.split(r"^(?=allocation )", text, flags=re.M):
        head = ALLOCATION.match(block)
        if head:
            yield int(head[1]), head[2], list(VALUE.finditer(block))


def _alive(values: list[Life], time: int) -> int:
    """Bytes that are taken at a time; several values may share a buffer."""
    total = reached = 0
    for value in sorted((each for each in values if each.first <= time <= each.last),
                        key=lambda each: each.begin):
        total += max(0, value.end - max(value.begin, reached))
        reached = max(reached, value.end)
    return total
