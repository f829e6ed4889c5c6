"""What was decided about a run, and what follows of it: pure functions of a list of decisions.

The list is in the meta of every checkpoint and, from the moment of each decision, in the ledger. So
a run that is killed after a decision and continued comes to the same batches and learning rates.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from batiste.data import position
from batiste.train.batch_sizes import records_before
from batiste.train.findings import Finding
from batiste.train.ledger import LEDGER_FILE, Ledger, read_ledger

FACTOR = 0.5  # What `lower` multiplies the learning rate by.
MOST = 3  # Roll-backs for one class to one step, before the run gives up.


@dataclasses.dataclass(frozen=True)
class Decision:
    """One action. kind, step: of the finding.

    action: "roll_back" or "lower". to: the step that a roll-back goes to, 0 for the start.
    skip_records: places [start, stop) in the order of the records, which are no longer read. since:
    the first step whose learning rate is lowered.
    """

    action: str
    kind: str
    step: int
    to: int | None = None
    skip_records: tuple[int, int] | None = None
    since: int | None = None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Decision":
        """The decision of a dict as JSON makes it, other fields left out.

        Raises ValueError for one of a version that counted batches and not records.
        """
        if fields.get("skip") is not None:
            raise ValueError(
                f"the decision to {fields['action']} because of {fields['kind']} at step "
                f"{fields['step']} is from a version of Batiste that counted the batches to skip and "
                "not the records: continue this run with that version, or choose another --workdir")
        known = {field.name: fields.get(field.name) for field in dataclasses.fields(cls)}
        skip = known["skip_records"]
        return cls(**known | {"skip_records": None if skip is None else tuple(skip)})


class RollBack(Exception):
    """Ends `fit`; `finding` says why."""

    def __init__(self, finding: Finding):
        super().__init__(finding.line())
        self.finding = finding


def decisions_of(meta: dict[str, Any]) -> list[Decision]:
    """The decisions in the meta of a run; none in one from before there were any."""
    return [Decision.of(fields) for fields in meta.get("decisions", ())]


def decide(decision: Decision, meta: dict[str, Any], ledger: Ledger) -> None:
    """Writes a decision down before anything follows of it."""
    fields = dataclasses.asdict(decision)
    ledger.write("decision", **fields)
    meta["decisions"].append(fields)


def learning_rate_factor(decisions: Sequence[Decision], step: int) -> float:
    """What multiplies the learning rate of step `step`, counted from 1."""
    lowered = [d for d in decisions if d.action == "lower" and step >= d.since]
    return FACTOR ** len(lowered)


def skipped(decisions: Sequence[Decision]) -> list[tuple[int, int]]:
    """The places of records that are not read."""
    return [decision.skip_records for decision in decisions if decision.skip_records is not None]


def steered(
    train_step: Callable, meta: dict[str, Any], place: Callable[[float], jax.Array], step: int
) -> Callable:
    """`train_step` with the learning rate that was decided; its first call is of step + 1.

    place: puts a number on the mesh.
    """
    factor, placed = None, None

    def steer(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        nonlocal factor, placed, step
        step += 1
        now = learning_rate_factor(decisions_of(meta), step)
        if now != factor:
            factor, placed = now, place(now)
        return train_step(state, batch, placed)

    return steer


def lower(finding: Finding) -> Decision:
    """To lower the learning rate: from the first step that has never been dispatched."""
    return Decision("lower", finding.kind, finding.step, since=finding.step + 2)


def roll_back(
    finding: Finding, saved: Sequence[int], decisions: Sequence[Decision], back: int,
    sizes: list[list[int]],
) -> Decision:
    """To go back at least `back` steps from a finding, and never to read their batches again.

    saved: steps that have a checkpoint. Where none is old enough it is the oldest, and the start of
    the run where there is none at all. sizes: of the run's batches (train/batch_sizes.py). Raises
    ValueError if that has been tried before.
    """
    old = [step for step in saved if step <= finding.step - back]
    older = [step for step in saved if step < finding.step]
    to = max(old) if old else min(older, default=0)
    tried = sum(d.action == "roll_back" and (d.kind, d.to) == (finding.kind, to) for d in decisions)
    if tried >= MOST:
        raise ValueError(
            f"rolled back to step {to} {tried} times because of {finding.kind}, and it is there "
            f"again: {finding.line()}"
        )
    windows = skipped(decisions)
    first = max(to, finding.step - back)
    start, stop = (records_before(sizes, step) for step in (first, finding.step))
    window = int(position(start, windows)), int(position(stop - 1, windows)) + 1
    return Decision("roll_back", finding.kind, finding.step, to, window)


def decided(workdir: pathlib.Path) -> list[Decision]:
    """All decisions of a run's ledger; a torn last line was not decided."""
    if not pathlib.Path(workdir, LEDGER_FILE).is_file():
        return []
    events = read_ledger(workdir)
    return [Decision.of(event) for event in events if event["event"] == "decision"]


def all_decisions(stored: Sequence[Decision], written: Sequence[Decision]) -> list[Decision]:
    """Every decision about a run, of its checkpoint and of its ledger, of which lines may be gone.

    stored: the decisions in the checkpoint, which is never ahead of a ledger that is whole.
    """
    if list(written[: len(stored)]) == list(stored):
        return list(written)
    return [*stored, *(decision for decision in written if decision not in stored)]


def start_of(
    start: int | None, stored: Sequence[Decision], decisions: Sequence[Decision]
) -> int | None:
    """Where to continue: at `start`, unless a decision that its checkpoint lacks goes farther back.

    stored: the decisions in that checkpoint; `decisions`: all.
    """
    back = [d.to for d in decisions[len(stored):] if d.action == "roll_back"]
    return min([start or 0, *back]) or None
