"""What crosses between slices, read from a compiled program's text."""

import math
import re

import numpy as np


def numbers(text: str) -> list[int]:
    """The numbers of "1,20,3"."""
    return [int(i) for i in text.split(",")]


def replica_groups(line: str) -> list[list[int]]:
    """Which devices a collective of a compiled program's text joins, in any of XLA's notations."""
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
        return [numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", line):
        return [numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]

    def ids(dims, order):
        iota = np.arange(math.prod(dims)).reshape(dims)
        return iota.transpose(numbers(order) if order else range(len(dims)))

    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return ids(numbers(iota[2]), iota[3]).reshape(numbers(iota[1])).tolist()
    order = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    named = re.search(rf"replica_groups=mesh\[([^\]]*)\]{order} \{{([^:}}]*)\}}", line)
    assert named, f"A notation of groups that is not known: {line}"
    names, sizes = zip(*re.findall(r"'([^']+)'=(\d+)", named[1]))
    sizes = [int(size) for size in sizes]
    axes = [names.index(name) for name in re.findall(r"'([^']+)'", named[4])]
    devices = ids(numbers(named[2]) if named[2] else sizes, named[3]).reshape(sizes)
    size = math.prod(sizes[axis] for axis in axes)
    return np.moveaxis(devices, axes, range(len(sizes) - len(axes), len(sizes))).reshape(
        -1, size).tolist()


def without_groups_of_one(text: str) -> str:
    """A compiled program's text without the collectives that join each device to itself alone."""
    return "\n".join(
        line for line in text.splitlines()
        if "replica_groups=" not in line or len(replica_groups(line)[0]) > 1
    )


def crossings(text: str, slices: int, devices: int) -> list[tuple[str, float, bool]]:
    """Every collective between slices: kind, bytes that a device sends, whether it is conditional.

    Written from the definitions: a sum of n bytes over S devices takes 2 (S - 1) / S n, a gather of
    n bytes in all (S - 1) / S n. Each must join a device of every slice.
    """
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    conditional, found = computations_in_a_condition(text), []
    for name, lines in computations(text).items():
        for line in lines:
            match = re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)
            if match is None:
                continue
            groups = replica_groups(line)
            of_slices = [[i // (devices // slices) for i in group] for group in groups]
            if all(len(set(group)) == 1 for group in of_slices):
                continue
            assert all(sorted(group) == list(range(slices)) for group in of_slices), line
            arrays = re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", match[1])
            size = sum(
                math.prod(numbers(dims) if dims else ()) * int(bits) // 8 for bits, dims in arrays)
            share = (slices - 1) / slices
            sent = {"all-reduce": 2 * share * size, "all-gather": share * size}[match[2]]
            found.append((match[2], sent, name in conditional))
    return found


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a compiled program; the one that runs is called ENTRY."""
    found, lines = {}, []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = found.setdefault("ENTRY" if header[1] else header[2], [])
        lines.append(line)
    return found


def computations_in_a_condition(text: str) -> set[str]:
    """The computations that run only where a conditional chooses them."""
    all_of, always, queue = computations(text), set(), ["ENTRY"]
    while queue:
        name = queue.pop()
        if name in always:
            continue
        always.add(name)
        for line in all_of[name]:
            if " conditional(" not in line:
                queue += [each for each in re.findall(r"%([\w.\-]+)", line) if each in all_of]
    return set(all_of) - always
