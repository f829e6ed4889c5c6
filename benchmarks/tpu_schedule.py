"""Reads a kernel's schedule as the TPU compiler writes it: cycles, stalls, and occupied units.

The compiler unrolls nothing further and reorders nothing after this point: a line of
`packed-bundles-post-ra.txt` is one address and one cycle, `{}` is a cycle in which nothing can
issue. `static-per-bundle-utilization.txt` says for each address how many units of a kind are
occupied (a vmatmul occupies its matrix unit for as long as it cannot take the next), and its header
how many there are. Memory that is not there yet would stall a real chip; here it is always there.

A conditional branch forwards skips a section, one backwards closes a loop. Branches take effect
after four more bundles.
"""

import glob
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np

DELAY_SLOTS = 4
EDGE_STORES = 16
BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s*(?:[A-Z]{2})?:[ >]*\{(.*)\}")
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
BRANCH = re.compile(r"sbr\.rel \(.*?\) target bundleno = (\d+)")
PASSES = "packed-bundles-post-ra|utilization"


class Span(NamedTuple):
    """Addresses from start up to stop, which a branch skips or repeats."""

    start: int
    stop: int
    is_loop: bool

    @property
    def cycles(self) -> int:
        """How long one pass takes."""
        return self.stop - self.start

    def holds(self, other: "Span") -> bool:
        """Whether the other lies inside; a span lies inside itself."""
        return self.start <= other.start and other.stop <= self.stop


class Schedule(NamedTuple):
    """One kernel: for each address whether it stalls and what it occupies; spans by their start."""

    name: str
    stalls: np.ndarray
    occupied: dict[str, np.ndarray]
    capacity: dict[str, int]
    spans: tuple[Span, ...]

    @property
    def whole(self) -> Span:
        """The kernel from its first address to its last."""
        return Span(0, len(self.stalls), False)

    def total(self, unit: str, span: Span) -> int:
        """How many cycles units of this kind are occupied, added over the units."""
        return int(self.occupied[unit][span.start:span.stop].sum())

    def stalled(self, span: Span) -> int:
        """In how many cycles nothing is issued."""
        return int(self.stalls[span.start:span.stop].sum())

    def floor(self, span: Span) -> float:
        """The cycles that the products alone would take if all matrix units were always busy."""
        return self.total("MATMUL", span) / self.capacity["MATMUL"]


class Body(NamedTuple):
    """A section of a grid step with products; `loop` is what it repeats, if it does."""

    section: Span
    loop: Span | None

    def cycles(self, visits: int, rounds: int) -> int:
        """The cost of entering `visits` times for `rounds` rounds of the loop in all."""
        inner = self.loop.cycles if self.loop else 0
        return visits * (self.section.cycles - inner) + rounds * inner


class Kernel(NamedTuple):
    """A grid step: its bodies by address, what it runs at the edges of a row, and the rest."""

    bodies: tuple[Body, ...]
    edge_cycles: int
    step_cycles: int


def environment(folder: str) -> dict[str, str]:
    """What a process that compiles needs so that the schedules lie in the folder afterwards.

    libtpu reads its flags when it is loaded, so each compilation is a process of its own.
    """
    flags = (f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
             f"--xla_jf_dump_llo_pass_label_regex={PASSES}")
    return os.environ | {
        "LIBTPU_INIT_ARGS": flags,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # There is no metadata server to ask.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def read(folder: str, name: str) -> Schedule:
    """The schedule of the one kernel whose name contains `name`."""
    ending = "-01-packed-bundles-post-ra.txt"
    found = [path for path in pathlib.Path(folder).glob(f"*{ending}") if name in path.name]
    if len(found) != 1:
        raise ValueError(f"{len(found)} schedules of a kernel {name!r}, expected one")
    (path,) = found
    begin = path.name.removesuffix(ending)
    (table,) = path.parent.glob(f"{glob.escape(begin)}-02-*utilization.txt")
    stalls, spans = _bundles(path.read_text())
    occupied, capacity = _utilization(table.read_text(), len(stalls))
    return Schedule(name, stalls, occupied, capacity, spans)


def _bundles(text: str) -> tuple[np.ndarray, tuple[Span, ...]]:
    """Which addresses stall, and the spans."""
    stalls, spans = [], set()
    for line in COMMENT.sub("", text).splitlines():  # Some comments span lines.
        bundle = BUNDLE.match(line)
        if not bundle:
            continue
        address = int(bundle[1], 16)
        if address != len(stalls):
            raise ValueError(f"address {address:#x} follows {len(stalls) - 1:#x}")
        stalls.append(not bundle[2].strip())
        for target in map(int, BRANCH.findall(bundle[2])):
            after = address + 1 + DELAY_SLOTS
            spans.add(Span(after, target, False) if target > address else Span(target, after, True))
    # The outer one of two that begin together comes first.
    ordered = sorted(spans, key=lambda span: (span.start, -span.stop, span.is_loop))
    return np.array(stalls), tuple(span for span in ordered if span.cycles > 0)


def _utilization(text: str, cycles: int) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Occupied units by kind and address, and how many of a kind there are."""
    lines = text.splitlines()
    header = next(index for index, line in enumerate(lines) if line.startswith("MATMUL"))
    names = [name.strip() for name in lines[header].split(",")]
    rows = [line.split() for line in lines[header + 1:] if re.match(r"^[\d\s]+\d\s*$", line)]
    counts = np.array(rows, dtype=int)
    # The table may have a row for the address after the last.
    if not cycles <= len(counts) - 1 <= cycles + 1:
        raise ValueError(f"utilization of {len(counts) - 1} addresses, schedule of {cycles}")
    occupied = dict(zip(names, counts[1:cycles + 1].T))
    return occupied, dict(zip(names, counts[0].tolist()))


def dissect(schedule: Schedule) -> Kernel:
    """What a grid step of the kernel consists of."""
    everything = schedule.total("MATMUL", schedule.whole)

    def products(span: Span) -> int:
        return schedule.total("MATMUL", span)

    loops = [span for span in schedule.spans if span.is_loop and products(span) == everything]
    grid = loops[0] if loops else schedule.whole
    inside = [span for span in schedule.spans if grid.holds(span) and span != grid]
    sections = _outermost([span for span in inside if products(span)]) or [grid]
    while len(sections) == 1:
        inner = _outermost([span for span in inside if products(span) and span != sections[0]
                            and sections[0].holds(span)])
        # A section that has products outside of what it holds is a body.
        if sum(map(products, inner)) != products(sections[0]):
            break
        inside, sections = [span for span in inside if span != sections[0]], inner
    bodies = []
    for section in sections:
        loop = next((span for span in inside if span.is_loop and section.holds(span)
                     and products(span)), None)
        bodies.append(Body(section, loop))
    edges = _outermost([
        span for span in inside
        if schedule.total("VSTORE", span) >= EDGE_STORES
        and not any(span.holds(section) or section.holds(span) for section in sections)
    ])
    edge_cycles = sum(span.cycles for span in edges)
    body_cycles = sum(section.cycles for section in sections)
    return Kernel(tuple(bodies), edge_cycles, grid.cycles - body_cycles - edge_cycles)


def _outermost(spans: list[Span]) -> list[Span]:
    """Those that lie in no other; `spans` come by their start, the outer one first."""
    chosen: list[Span] = []
    for span in spans:
        if not any(other.holds(span) for other in chosen):
            chosen.append(span)
    return chosen
