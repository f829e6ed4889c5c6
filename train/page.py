"""What `batiste report` says of a work directory: as text, and as a page that fetches nothing."""

import datetime
import html
import os
import pathlib
from typing import Any

from batiste.train.account import RUNNING, Account, read_account
from batiste.train.progress import duration
from batiste.train.plots import draw_all, read_records

PAGE_FILE = "report.html"
MOST_EVENTS = 20  # Of one kind; the first and the last of more are shown.
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } .headline { font-size: 1.15rem; }
td { vertical-align: top; overflow-wrap: anywhere; }"""
Table = tuple[str, list[str], list[list[str]]]  # Title, heads, rows.


def report(workdir: str | os.PathLike) -> tuple[str, pathlib.Path]:
    """Writes report.html; returns the same as text, without the plots, and the path of the page.

    Raises ValueError where there is no ledger.
    """
    workdir = pathlib.Path(workdir)
    account = read_account(workdir)
    lines, tables = headline(account), _tables(account)
    path = workdir / PAGE_FILE
    plots = draw_all(read_records(workdir), account)
    path.write_text(_page(workdir.resolve().name, lines, tables, plots), encoding="utf-8")
    return "\n".join([*lines, *map(_text, tables)]), path


def headline(account: Account) -> list[str]:
    """What to know first, a sentence each."""
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


def _tables(account: Account) -> list[Table]:
    total = sum(account.seconds.values())
    phases = [[name, f"{seconds:,.1f}", f"{seconds / total:.1%}" if total else ""]
              for name, seconds in account.seconds.items()]
    phases.append(["sum", f"{total:,.1f}", "100.0%"])
    phases.append(["the clock", f"{account.clock_seconds:,.1f}", ""])
    starts = [[f"{index}", _when(start.time), f"{start.first:,} to {start.reached:,}",
               f"{start.end - start.begin:,.1f}", start.ended]
              for index, start in enumerate(account.starts, start=1)]
    facts = [[name, str(value)] for name, value in account.starts[-1].facts.items()]
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
    """In order; of very many of one kind the first and the last."""
    by_kind: dict[str, list[int]] = {}
    for index, event in enumerate(happened):
        by_kind.setdefault(event["event"], []).append(index)
    left_out = {index for places in by_kind.values()
                for index in places[MOST_EVENTS // 2:len(places) - MOST_EVENTS // 2]}
    rows = []
    for index, event in enumerate(happened):
        if index not in left_out:
            fields = {name: value for name, value in event.items()
                      if name not in ("at", "time", "clock", "event") and value is not None}
            what = fields.get("says") or ", ".join(
                f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in fields.items())
            rows.append([f"{event['at']:,.1f} s", event["event"], str(what)])
    if left_out:
        rows.append(["", "...", f"{len(left_out):,} more are in the ledger"])
    return rows


def _text(table: Table) -> str:
    title, heads, rows = table
    cells = [heads, *rows] if any(heads) else rows
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    lines = []
    for row in cells:
        padded = [cell.rjust(width) if _is_number(cell) and any(heads) else cell.ljust(width)
                  for cell, width in zip(row, widths, strict=True)]
        lines.append(("  " + "  ".join(padded)).rstrip())
    return "\n".join([f"\n{title}", *lines])


def _page(name: str, lines: list[str], tables: list[Table], plots: dict[str, str]) -> str:
    parts = [f'<p class="headline">{html.escape(line)}</p>' for line in lines]
    for title, uri in plots.items():
        parts.append(f'<h2>{html.escape(title)}</h2>\n<img alt="{html.escape(title)}" src="{uri}">')
    for title, heads, rows in tables:
        head = "".join(f"<th>{html.escape(each)}</th>" for each in heads)
        body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        parts.append(f"<h2>{html.escape(title)}</h2>\n<table><thead><tr>{head}</tr></thead>\n"
                     f"<tbody>{body}</tbody></table>")
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{html.escape(name)}</title><style>{STYLE}</style></head>\n<body>"
            f"<h1>{html.escape(name)}</h1>\n{chr(10).join(parts)}\n</body></html>\n")


def _cell(text: str) -> str:
    kind = ' class="number"' if _is_number(text) else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _is_number(text: str) -> bool:
    return text.rstrip("% s").replace(",", "").replace(".", "").isdecimal()


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
