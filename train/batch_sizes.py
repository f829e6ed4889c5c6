"""How many records a run has read before each of its steps, though its batch size has changed.

A list [[first step, rows], ...] in the meta of every checkpoint, steps from 0, says from which step
on batches have how many rows. So the records that a step reads follow from the list alone.
"""

from typing import Any


def batch_sizes_of(meta: dict[str, Any]) -> list[list[int]]:
    """The list in the meta of a run; one from before there was any has had one batch size."""
    return [list(size) for size in
            meta.get("batch_sizes") or [[0, meta["config"]["train.batch_size"]]]]


def with_batch_size(sizes: list[list[int]], step: int, rows: int) -> list[list[int]]:
    """The list of a run that continues after `step` steps with batches of `rows`."""
    before = [size for size in sizes if size[0] < step]
    return before if before and before[-1][1] == rows else [*before, [step, rows]]


def records_before(sizes: list[list[int]], step: int) -> int:
    """The records that the first `step` steps have read."""
    ends = [first for first, _ in sizes[1:]] + [step]
    return sum(rows * max(0, min(end, step) - first)
               for (first, rows), end in zip(sizes, ends, strict=True))
