"""Where the time of a run went, over all its starts, from its ledger alone: no jax, no device."""

import dataclasses
import os
import pathlib
import statistics
import time
from typing import Any

from batiste.train.ledger import FLUSH_SECONDS, LEDGER_FILE, PHASES, PULSE_SECONDS, read_ledger

# What a start did before it died and did not come to write down; and when there was none.
LOST, DOWN = "lost", "down"
FINISHED = ("done", "patience")
RUNNING, KILLED = "running", "killed"
SUPERVISION = ("supervise", "exit")  # Written by `batiste supervise`, which outlives the starts.
# Every other event is something that has happened to the run, and is listed.
BOOKKEEPING = ("exit", "start", "run", "from", "phase", "first step", "end")


@dataclasses.dataclass
class Start:
    """One start of a run; `begin`, `end` and `recovered` in seconds since the first start.

    time: when, in seconds since the epoch. first: the step it continued from; reached: the last one
    it completed. recovered: when the first of them was complete. ended: "done", "patience",
    "SIGINT", "SIGTERM", "error", "running", or what killed it; told: it said so itself.
    """

    begin: float
    end: float
    time: float
    first: int = 0
    reached: int = 0
    recovered: float | None = None
    ended: str = KILLED
    told: bool = False
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Stretch:
    """Steps after `first` up to `last`, the seconds of phase "step" that they took, their end."""

    first: int
    last: int
    seconds: float
    until: float


@dataclasses.dataclass
class Leg:
    """Steps that a start did one after the other, from `first` to `reached`."""

    start: Start
    first: int
    reached: int


@dataclasses.dataclass
class Account:
    """All time of a run by phase, "lost" and "down" included, and what of it was worth while.

    clock_seconds: from the first line to the last sign of life, by clocks alone. recoveries:
    seconds from each death to the next step that was completed. intervals: (begin, end, phase) in
    seconds since the first start; of several phases the one that took most.
    """

    seconds: dict[str, float]
    clock_seconds: float = 0.0
    starts: list[Start] = dataclasses.field(default_factory=list)
    stretches: list[Stretch] = dataclasses.field(default_factory=list)
    legs: list[Leg] = dataclasses.field(default_factory=list)
    steps_lost: int = 0
    steps_recomputed: int = 0
    recoveries: list[float] = dataclasses.field(default_factory=list)
    intervals: list[tuple[float, float, str]] = dataclasses.field(default_factory=list)
    happened: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def productive_seconds(self) -> float:
        """Of steps whose result the run still has; what had to be computed again counts once."""
        return sum(each.seconds for each in self.stretches if each.last > each.first)

    @property
    def goodput(self) -> float:
        """Productive step time / all time; 0 before there is any."""
        total = sum(self.seconds.values())
        return self.productive_seconds / total if total else 0.0

    @property
    def mean_recovery(self) -> float | None:
        """Mean time to recovery in seconds; None where nothing has recovered."""
        return statistics.fmean(self.recoveries) if self.recoveries else None

    def add(self, begin: float, end: float, seconds: dict[str, float]) -> None:
        """Books an interval."""
        for phase, value in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        if seconds:
            self.intervals.append((begin, end, max(seconds, key=seconds.get)))


def read_account(workdir: str | os.PathLike) -> Account:
    """Adds up the ledger of a work directory; ValueError where it has none, or no start in it."""
    groups: list[list[dict[str, Any]]] = []
    for event in read_ledger(workdir):
        if event["event"] == "start":
            groups.append([])
        if groups:  # Before the first start there is the supervisor's own.
            groups[-1].append(event)
    if not groups:
        raise ValueError(f"workdir={workdir}: {LEDGER_FILE} holds no start of a run")
    changed = pathlib.Path(workdir, LEDGER_FILE).stat().st_mtime
    running = time.time() - changed < 3 * PULSE_SECONDS
    total = Account(dict.fromkeys((*PHASES, LOST, DOWN), 0.0))
    now = 0.0
    for group, following in zip(groups, [*groups[1:], None]):
        start = Start(now, now, group[0]["time"], ended=RUNNING)
        total.starts.append(start)
        booked, doing = _add_own(total, start, group)
        if start.ended == RUNNING and not (running and following is None):
            alive = changed if following is None else following[0]["alive"] or 0.0
            _find_death(start, group, alive)
        rest = doing if start.ended == RUNNING else "idle" if start.told else LOST
        total.add(booked, start.end, {rest: start.end - booked})
        if following is not None:
            now = start.end + _gap(group[0], start, following[0])
            asked = start.ended in (*FINISHED, "SIGINT")
            total.add(start.end, now, {"idle" if asked else DOWN: now - start.end})
    first, last = total.starts[0], total.starts[-1]
    boots = {group[0]["boot"] for group in groups}
    total.clock_seconds = (
        groups[-1][0]["clock"] - groups[0][0]["clock"] if len(boots) == 1 and None not in boots
        else last.time - first.time) + last.end - last.begin
    _add_recoveries(total)
    return total


def _add_own(total: Account, start: Start, group: list[dict[str, Any]]) -> tuple[float, str]:
    """Books what a start has written down; until when that is, and what it did from there on."""
    head = group[0]
    booked, doing = start.begin, PHASES[0]
    for event in group:
        at = start.begin + event["clock"] - head["clock"]
        match event["event"]:
            case "run":
                start.facts = {name: value for name, value in event.items()
                               if name not in ("time", "clock", "event")}
            case "from":
                _continue_from(total, start, event["step"], event["reached"])
            case "first step":
                start.recovered = at
            case "phase":
                total.add(booked, at, event["seconds"])
                _add_steps(total, start, event)
                booked, doing = at, event["next"]
            case "end":
                start.ended, start.told = event["reason"], True
            case "exit" if event["pid"] == head["pid"]:
                # Several supervisors may write; this one has waited for this very process.
                start.ended = start.ended if start.told else event["what"]
            case "exit":
                continue
            case "started" if not (event["passed_over"] or event["changed"]):
                pass
            case name if name not in BOOKKEEPING:
                total.happened.append({"at": at, **event})
        if event["event"] != "supervise":  # That may come long after the end.
            start.end = max(start.end, at)
    return booked, doing


def _find_death(start: Start, group: list[dict[str, Any]], alive: float) -> None:
    """Lets a start end where it was last seen: `alive`, in seconds since the epoch."""
    last = [event for event in group if event["event"] not in SUPERVISION][-1]
    seen = min(max(0.0, alive - last["time"]), FLUSH_SECONDS + 2 * PULSE_SECONDS)
    start.end, start.ended = start.end + seen, KILLED


def _continue_from(total: Account, start: Start, step: int, reached: int) -> None:
    """From here on steps follow `step`; what was done beyond it, up to `reached`, is lost."""
    if total.legs:
        last = total.legs[-1]
        last.reached = last.start.reached = max(last.reached, reached)
        total.steps_lost += max(0, last.reached - step)
    total.legs.append(Leg(start, step, step))
    start.first = start.reached = step
    kept = []
    for each in total.stretches:
        if each.first < min(step, each.last):
            last = min(step, each.last)
            share = (last - each.first) / (each.last - each.first)
            kept.append(Stretch(each.first, last, each.seconds * share, each.until))
    total.stretches = kept


def _add_steps(total: Account, start: Start, event: dict[str, Any]) -> None:
    """Books the steps of a "phase" line; seconds without a complete step are of the next one."""
    seconds, step = event["seconds"].get("step", 0.0), event["step"]
    if step is None:
        return
    if not total.legs:  # The line that says from where is lost.
        _continue_from(total, start, 0, 0)
    last = total.stretches[-1] if total.stretches else None
    if last is not None and last.first == last.last == start.reached:
        last.last, last.seconds, last.until = step, last.seconds + seconds, start.end
    else:
        total.stretches.append(Stretch(start.reached, step, seconds, start.end))
    start.reached = total.legs[-1].reached = step


def _gap(head: dict[str, Any], start: Start, following: dict[str, Any]) -> float:
    """Seconds from the end of a start to the beginning of the following one.

    By the wall clock only between machines or boots; should it have gone back, then 0.
    """
    same_boot = head["boot"] is not None and head["boot"] == following["boot"]
    name = "clock" if same_boot else "time"
    return max(0.0, following[name] - head[name] - (start.end - start.begin))


def _add_recoveries(total: Account) -> None:
    """What was computed twice, and how long it took after each death until a step was complete."""
    frontier = 0
    for leg in total.legs:
        total.steps_recomputed += max(0, min(leg.reached, frontier) - leg.first)
        frontier = max(frontier, leg.reached)
    died = None
    for start in total.starts:
        if died is not None and start.recovered is not None:
            total.recoveries.append(start.recovered - died)
            died = None
        if died is None and start.ended not in (*FINISHED, "SIGINT", RUNNING):
            died = start.end
