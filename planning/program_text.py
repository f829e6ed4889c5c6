"""Reads a compiled program's text: what it sends and multiplies, loops as often as they run.

XLA's own cost analysis counts the body of a loop once.
"""

import collections
import math
import re
from typing import NamedTuple

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute",
)
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """A line of a computation: name, type of the result, operation, and all that follows."""

    name: str
    type: str
    operation: str
    rest: str


class Totals(NamedTuple):
    """Of one device in one step.

    flops: of products outside of kernels. collectives: bytes of the results, by kind; a sum that is
    scattered at once counts as reduce-scatter, with the bytes that go in.
    """

    flops: float
    collectives: dict[str, float]


def read_program(text: str) -> Totals:
    """What the program does in all, by following its loops and calls from the entry."""
    computations, entry = _computations(text)
    times = collections.Counter({entry: 1})
    for name in _callers_first(computations, entry):
        for callee, count in _calls(computations, name):
            times[callee] += times[name] * count
    flops, sent = 0.0, collections.Counter()
    for name, instructions in computations.items():
        types = {each.name: each.type for each in instructions}
        for each in instructions:
            if each.operation in ("convolution", "dot"):
                flops += times[name] * _product_flops(each, types)
            kind = each.operation.removesuffix("-start")
            if kind in COLLECTIVES:
                scattered = kind == "all-reduce" and name.startswith("all-reduce-scatter")
                kind = "reduce-scatter" if scattered else kind
                sent[kind] += times[name] * _sent_bytes(each, types)
    return Totals(flops, {kind: size for kind, size in sorted(sent.items()) if size})


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    found, name, entry = {}, None, None
    for line in text.splitlines():
        head = COMPUTATION.match(line)
        if head:
            name = head[1]
            found[name] = []
            entry = name if line.startswith("ENTRY") else entry
        instruction = INSTRUCTION.match(line)
        if instruction and name:
            found[name].append(Instruction(*instruction.groups()))
    return found, entry


def _callers_first(computations: dict, entry: str) -> list[str]:
    """Computations that the entry reaches, each after all that call it."""
    done, order = set(), []

    def visit(name: str) -> None:
        if name in done:
            return
        done.add(name)
        for callee, _ in _calls(computations, name):
            visit(callee)
        order.append(name)

    visit(entry)
    return order[::-1]


def _calls(computations: dict, name: str) -> list[tuple[str, int]]:
    """What a computation calls, and how often each time that it runs."""
    calls = []
    for each in computations[name]:
        loop = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", each.rest)
        if loop:
            calls.append((loop[2], _trips(computations[loop[1]])))
        else:
            callees = re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", each.rest)
            calls += [(callee, 1) for callee in callees]
    return [(callee, count) for callee, count in calls if callee in computations]


def _trips(condition: list[Instruction]) -> int:
    """How often a loop runs whose condition is `index < constant`, counting from 0."""
    constants = [
        int(match[1]) for each in condition
        if each.operation == "constant" and (match := re.match(r"(\d+)\)", each.rest))
    ]
    return max(constants, default=1)


def _product_flops(product: Instruction, types: dict[str, str]) -> float:
    """2 M N K, which is twice the root of the three arrays' sizes: MK, KN and MN."""
    operands = re.findall(r"%([\w.\-]+)", product.rest.split("),")[0])[:2]
    sizes = [_elements(types[name]) for name in operands] + [_elements(product.type)]
    return 2 * math.sqrt(math.prod(sizes))


def _elements(type_: str) -> int:
    return math.prod(int(dim) for dim in ARRAY.search(type_)[2].split(",") if dim)


def _sent_bytes(collective: Instruction, types: dict[str, str]) -> float:
    """Bytes of the result; of what goes in, where that is scattered. What starts asynchronously has
    operands and results in its type."""
    if collective.operation == "reduce-scatter":
        operands = re.findall(r"%([\w.\-]+)", collective.rest.split(")")[0])
        return sum(sum(_array_bytes(types[name])) for name in operands)
    sizes = _array_bytes(collective.type)
    return max(sizes) if collective.operation.endswith("-start") else sum(sizes)


def _array_bytes(type_: str) -> list[float]:
    """Of each array in a type."""
    return [
        ITEM_BYTES.get(item, 4) * math.prod(int(dim) for dim in dims.split(",") if dim)
        for item, dims in ARRAY.findall(type_)
    ]
