"""Keeps the health lines of metrics.jsonl few: whole where they are needed, their loss elsewhere.

A line of 32 layers has 20 kB, which are 2 GB in 100,000 steps. Whole ones stay where a run may be
continued (so many looks before each checkpoint and before now are looked at again), around what was
found, and evenly over the run for its heat maps. Of the others the step and the loss stay.
"""

import bisect
import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterable

from batiste.train.ledger import LEDGER_FILE, read_ledger

EVERY = 1024  # Looks between two rewritings of the file.
EVENLY = 1024  # Whole lines over the run, besides those that are needed.
NEAR = 32  # Looks before and after a finding.
_LOOK = re.compile(rb'\{"step":(\d+),"kind":"health",')
_THIN = re.compile(rb'\{"step":\d+,"kind":"health","loss":[^,]+\}\s*')


def thin(path: pathlib.Path, look_back: int) -> None:
    """Rewrites the metrics.jsonl of a work directory, whole or not at all.

    look_back: looks that a continued run looks at again.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    looks = [(place, int(found[1])) for place, line in enumerate(lines)
             if (found := _LOOK.match(line))]
    steps = [step for _, step in looks]
    anchors = [*_saved(path.parent), *steps[-1:]]
    kept = kept_whole(steps, anchors, _found(path.parent), look_back)
    for number, (place, _) in enumerate(looks):
        if number not in kept and not _THIN.fullmatch(lines[place]):
            lines[place] = _thinned(lines[place])
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):  # A disk that is full: the long file stays.
            temporary.unlink()


def kept_whole(
    steps: list[int], anchors: Iterable[int], found: Iterable[int], look_back: int
) -> set[int]:
    """Which looks stay whole, by number; `steps` ascend.

    anchors: steps after which the run may go on. found: steps of findings.
    """
    stride = 1
    while len(steps) > EVENLY * stride:
        stride *= 2  # A longer run keeps some of those that a shorter one has kept.
    kept = set(range(0, len(steps), stride))
    for anchor in anchors:
        past = _place(steps, anchor + 1)
        kept |= set(range(max(0, past - look_back), past))
    for step in found:
        place = _place(steps, step)
        kept |= set(range(max(0, place - NEAR), min(len(steps), place + NEAR)))
    return kept


def is_thinned(record: dict) -> bool:
    """Whether of a health record only the loss was kept."""
    return "gradient" not in record


def _place(steps: list[int], step: int) -> int:
    """How many looks there are before a step."""
    return bisect.bisect_left(steps, step)


def _thinned(line: bytes) -> bytes:
    record = json.loads(line)
    short = {"step": record["step"], "kind": record["kind"], "loss": record["loss"]}
    return json.dumps(short, separators=(",", ":")).encode() + b"\n"


def _saved(workdir: pathlib.Path) -> list[int]:
    folders = (workdir / "checkpoints").glob("[0-9]*")
    return [int(folder.name) for folder in folders if folder.name.isdecimal()]


def _found(workdir: pathlib.Path) -> list[int]:
    if not (workdir / LEDGER_FILE).is_file():
        return []
    return [event["step"] for event in read_ledger(workdir) if event["event"] == "finding"]
