"""What a report says in words and tables, of one run or of several beside each other."""

import datetime
from typing import Any

from batiste.train.account import RUNNING, Account
from batiste.train.progress import duration
from batiste.train.run_data import RunData, headline_numbers, state_in_words
from batiste.train.words import in_words, sentence

MOST_EVENTS = 20  # Of one kind; the first and the last of more are shown.
FACTS = ("device", "devices", "processes", "code", "config", "data")
Table = tuple[str, list[str], list[list[str]]]  # Title, heads, rows.


def headline(account: Account) -> list[str]:
    """What to know first of where the time went, a sentence each."""
    total = sum(account.seconds.values())
    last = account.starts[-1]
    how = last.ended if last.ended == RUNNING else f"ended: {last.ended}"
    lines = [
        f"{_count(len(account.starts), 'start')}, {duration(total)}, at step {last.reached:,}, "
        f"{how}.",
        f"Goodput {account.goodput:.1%}: {account.productive_seconds:,.1f} s of steps that were "
        f"kept, of {total:,.1f} s.",
    ]
    if account.mean_recovery is not None:
        lines.append(f"Mean time to recovery {account.mean_recovery:,.1f} s over "
                     f"{_count(len(account.recoveries), 'interruption')}.")
    if account.steps_lost:
        lines.append(f"{_count(account.steps_lost, 'step')} lost, {account.steps_recomputed:,} "
                     "computed again.")
    return lines


def tables_of(account: Account) -> list[Table]:
    """Time by phase, the starts, what has happened, and what the run is made of."""
    total = sum(account.seconds.values())
    phases = [[name, f"{seconds:,.1f}", f"{seconds / total:.1%}" if total else ""]
              for name, seconds in account.seconds.items()]
    phases.append(["sum", f"{total:,.1f}", "100.0%"])
    phases.append(["the clock", f"{account.clock_seconds:,.1f}", ""])
    starts = [[f"{index}", in_utc(start.time), f"{start.first:,} to {start.reached:,}",
               f"{start.end - start.begin:,.1f}", start.ended]
              for index, start in enumerate(account.starts, start=1)]
    facts = [[name, in_words(account.starts[-1].facts[name])] for name in FACTS
             if name in account.starts[-1].facts]
    tables: list[Table] = [
        ("Time", ["phase", "seconds", "share"], phases),
        ("Starts", ["start", "when (UTC)", "steps", "seconds", "ended"], starts),
    ]
    if account.happened:
        tables.append(("Events", ["after", "event", "what"], _events(account.happened)))
    if facts:
        tables.append(("Run", ["", ""], facts))
    return tables


def _events(happened: list[dict[str, Any]]) -> list[list[str]]:
    """In order and in words; of very many of one kind the first and the last."""
    by_kind: dict[str, list[int]] = {}
    for index, event in enumerate(happened):
        by_kind.setdefault(event["event"], []).append(index)
    left_out = {index for places in by_kind.values()
                for index in places[MOST_EVENTS // 2:len(places) - MOST_EVENTS // 2]}
    rows = [[duration(event["at"]), event["event"].replace("_", " "), sentence(event)]
            for index, event in enumerate(happened) if index not in left_out]
    if left_out:
        rows.append(["", "...", f"{len(left_out):,} more are in the ledger"])
    return rows


def comparison(names: list[str], runs: list[RunData]) -> list[Table]:
    """The headline numbers of several runs, and the fields of their configs that differ."""
    numbers = [headline_numbers(run) for run in runs]
    first = [["state", *map(state_in_words, runs)]]
    first += [[row[0].label, *(number.value for number in row)] for row in zip(*numbers)]
    fields = sorted({name for run in runs for name in run.config})
    absent = object()
    differing = [name for name in fields
                 if any(run.config.get(name, absent) != runs[0].config.get(name, absent)
                        for run in runs)]
    second = [[name, *(in_words(run.config[name]) if name in run.config else "–" for run in runs)]
              for name in differing]
    return [("Runs", ["", *names], first), ("Fields that differ", ["field", *names], second)]


def as_text(table: Table) -> str:
    """A table for a terminal."""
    title, heads, rows = table
    cells = [heads, *rows] if any(heads) else rows
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    lines = []
    for row in cells:
        padded = [cell.rjust(width) if is_number(cell) and any(heads) else cell.ljust(width)
                  for cell, width in zip(row, widths, strict=True)]
        lines.append(("  " + "  ".join(padded)).rstrip())
    return "\n".join([f"\n{title}", *lines])


def is_number(text: str) -> bool:
    """Whether a cell is aligned to the right."""
    return text.rstrip("% s").replace(",", "").replace(".", "").isdecimal()


def in_utc(seconds: float) -> str:
    """A time since the epoch as date and time."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
