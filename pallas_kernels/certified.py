"""What the attention kernels are certified for, as data; the tests go through every entry of it.

An entry says: for these chips, masks of these conditions, with any subset of the features, in these
dtypes and head dims, value, log-sum-exp and all gradients were compared with the reference in fp32,
and the kernel was compiled for the chip. What no entry covers is refused, by name.
"""

import itertools
from typing import NamedTuple

from batiste.pallas_kernels.mask import AttentionMask

TPU_CHIPS = ("v5e", "v5p", "v6e", "tpu7x")
GPU_CHIPS = ("hopper", "ampere")
CHIPS = TPU_CHIPS + GPU_CHIPS
FEATURES = ("soft_cap", "sinks", "alibi", "dropout")
DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (64, 80, 96, 128, 192, 256)  # Others, up to the largest, are padded to 16's multiples.
CONDITIONS = ("causal", "window", "prefix", "segments", "sparse", "offset")


# Which intersections are left out, and of what names: a prefix means something under causality alone,
# and a layout of blocks is known when the kernel is built, an offset is not.
EXCEPTIONS = {
    "prefix without causal": lambda names: "prefix" in names and "causal" not in names,
    "sparse with offset": lambda names: "sparse" in names and "offset" in names,
}


def _intersections() -> tuple[tuple[str, ...], ...]:
    """Every intersection of the conditions, from none of them on, but the exceptions."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(CONDITIONS, count) for count in range(len(CONDITIONS) + 1)
    )
    return tuple(
        names for names in subsets if not any(left_out(names) for left_out in EXCEPTIONS.values())
    )


MASKS = _intersections()


class Entry(NamedTuple):
    """One line of the certification."""

    chips: tuple[str, ...]
    mask: tuple[str, ...]
    features: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]


CERTIFIED = tuple(
    Entry(chips, mask, FEATURES, DTYPES, HEAD_DIMS)
    for chips in (TPU_CHIPS, GPU_CHIPS)
    for mask in MASKS
)


def conditions(mask: AttentionMask) -> tuple[str, ...]:
    """The names of the conditions that a mask intersects, in the order of `CONDITIONS`."""
    given = {
        "causal": mask.causal,
        "window": mask.window is not None,
        "prefix": mask.prefix_B is not None,
        "segments": mask.query_segments_BT is not None,
        "sparse": mask.sparsity is not None,
        "offset": mask.query_offset_B is not None,
    }
    return tuple(name for name, present in given.items() if present)


def check(chip: str, mask: tuple[str, ...], dtype: str, head_dim: int) -> None:
    """Raises ValueError, naming the nearest certified choice, for what no entry covers.

    mask: as `conditions` gives it. Features need no check: every entry has all of them.
    """
    if chip not in CHIPS:
        raise ValueError(f"attention={chip!r}: expected one of reference, {', '.join(CHIPS)}")
    entries = [entry for entry in CERTIFIED if chip in entry.chips]
    nearest = min(entries, key=lambda entry: len(set(entry.mask) ^ set(mask)))
    if set(nearest.mask) != set(mask):
        raise ValueError(
            f"attention={chip!r} is not certified for a mask of {_named(mask)}: the nearest "
            f"certified one is {_named(nearest.mask)}; or choose attention='reference'"
        )
    if dtype not in nearest.dtypes:
        raise ValueError(
            f"attention={chip!r} is not certified for {dtype}: choose one of "
            f"{', '.join(nearest.dtypes)}; or attention='reference'"
        )
    if head_dim > max(nearest.head_dims):
        raise ValueError(
            f"attention={chip!r} is not certified for head dim {head_dim}: the nearest certified "
            f"one is {max(nearest.head_dims)}; or choose attention='reference'"
        )


def check_sparsity(chip: str, mask: AttentionMask) -> None:
    """Raises ValueError for blocks of a sparse mask that the kernels' bits cannot describe."""
    block = None if mask.sparsity is None else mask.sparsity.block
    if block is not None and (block < 32 or block & (block - 1)):
        raise ValueError(
            f"attention={chip!r} is certified for blocks of sparsity that are powers of two from "
            f"32 on, got {block}: the nearest is {max(32, 1 << (block - 1).bit_length())}"
        )


def chip_of(device_kind: str) -> str | None:
    """The chip whose kernels a device runs, from its name in JAX; None for one that has none."""
    kind = device_kind.lower()
    names = {
        "v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e",
        "tpu7x": "tpu7x", "h100": "hopper", "h200": "hopper", "gh200": "hopper", "h800": "hopper",
        "a100": "ampere", "a800": "ampere",
    }
    return next((chip for name, chip in names.items() if name in kind), None)


def certification_table() -> str:
    """The documentation's table, as Markdown: entries that differ in their mask share a row."""
    rows: dict[tuple, list] = {}
    for entry in CERTIFIED:
        rows.setdefault(entry._replace(mask=()), []).append(entry.mask)
    lines = [
        "| chips | masks | with any of | dtypes | head dims | entries |", "|---|---|---|---|---|---|"
    ]
    for shared, masks in rows.items():
        dims = ", ".join(map(str, shared.head_dims))
        columns = (
            ", ".join(shared.chips), _described(masks), ", ".join(shared.features),
            ", ".join(shared.dtypes), f"{dims}; others to {max(shared.head_dims)} by padding",
            str(len(masks)),
        )
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _described(masks: list[tuple[str, ...]]) -> str:
    """What masks are among these: by rule where they are all of `MASKS`, by name otherwise."""
    if set(masks) != set(MASKS):
        return "; ".join(map(_named, masks))
    return f"full, or any of {', '.join(CONDITIONS)} together, but not {' or '.join(EXCEPTIONS)}"


def _named(mask: tuple[str, ...]) -> str:
    return " + ".join(mask) if mask else "full"
