"""`batiste report`: what a work directory, or several beside each other, has to show.

As text, and as one page (page.css, page.js) that fetches nothing: Plotly's own script is in it,
compressed, from the installed package. Every text of a run is escaped: configs, samples and errors
may hold anything. The page's own policy forbids it the network.
"""

import base64
import gzip
import html
import importlib.resources
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from batiste.train.account import RUNNING, Account
from batiste.train.curves import curves_of, evenly, layers_of, short, tokens_of
from batiste.train.run_data import Number, RunData, headline_numbers, read_run, state_in_words
from batiste.train.tables import (
    Table, as_text, comparison, headline, in_utc, is_number, tables_of,
)
from batiste.train.words import in_words

PAGE_FILE, COMPARISON_FILE = "report.html", "comparison.html"
MOST_INTERVALS = 3000  # Of the timeline.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


def report(*workdirs: str | os.PathLike) -> tuple[str, pathlib.Path]:
    """Writes the page; returns what it says as text, and its path.

    Of one work directory it is report.html in it; of several, comparison.html in the folder that
    holds them. Raises ValueError where there is no ledger.
    """
    runs = [read_run(workdir) for workdir in workdirs]
    if len(runs) == 1:
        path = pathlib.Path(workdirs[0], PAGE_FILE)
        path.write_text(_page([runs[0].name], runs), encoding="utf-8")
        tables = tables_of(runs[0].account)
        return "\n".join([*headline(runs[0].account), *map(as_text, tables)]), path
    names = _distinct_names(workdirs)
    parents = [pathlib.Path(workdir).resolve().parent for workdir in workdirs]
    path = pathlib.Path(os.path.commonpath(parents), COMPARISON_FILE)
    path.write_text(_page(names, runs), encoding="utf-8")
    return "\n".join(map(as_text, comparison(names, runs))).lstrip("\n"), path


def _distinct_names(workdirs: Sequence[str | os.PathLike]) -> list[str]:
    """The names of the directories; with as much of their paths as tells them apart."""
    paths = [pathlib.Path(workdir).resolve().parts for workdir in workdirs]
    if len(set(paths)) < len(paths):
        raise ValueError("report: expected different work directories, got one of them twice")
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    return names


def _page(names: list[str], runs: list[RunData]) -> str:
    one = runs[0] if len(runs) == 1 else None
    title = names[0] if one is not None else f"{len(names)} runs: {', '.join(names)}"
    data = {"runs": [_plotted(name, run) for name, run in zip(names, runs, strict=True)]}
    compared = [] if one is not None else [_table(table) for table in comparison(names, runs)]
    first = [_cards(headline_numbers(runs[0]))] if one is not None else compared[:1]
    parts = [_header(title, runs), "<main>", *first, CONTROLS,
             '<section id="plots"></section>',
             '<section id="layers" hidden><h2>Layers</h2><div class="row" id="layer-choice"></div>'
             '<div class="plot" id="layer-map"></div></section>']
    parts += [*compared[1:], _samples(names, runs)]
    if one is not None:
        time, starts, *others = tables_of(one.account)
        events = [_table(table) for table in others if table[0] == "Events"]
        facts = [_table(table) for table in others if table[0] != "Events"]
        sentences = "".join(f"<p>{_escaped(line)}</p>" for line in headline(one.account))
        parts += [*events, '<section><h2>Where the time went</h2>' + sentences
                  + '<div class="plot" id="timeline"></div></section>',
                  _table(time), _table(starts), _config(one), *facts]
    parts.append("</main>")
    room = importlib.resources.files("batiste.train")
    style, code = ((room / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_escaped(title)}</title><style>{style}</style></head>\n<body>"
            f"{chr(10).join(parts)}\n"
            f'<script type="application/json" id="data">{_json(data)}</script>\n'
            f'<script type="text/plain" id="plotly">{_plotly()}</script>\n'
            f"<script>{code}</script></body></html>\n")


def _plotly() -> str:
    """Plotly's script as base64 of gzip, 2 MB for 4.8: a browser can unpack that by itself."""
    script = importlib.resources.files("plotly") / "package_data" / "plotly.min.js"
    return base64.b64encode(gzip.compress(script.read_bytes(), 9, mtime=0)).decode()


def _json(data: Any) -> str:
    """JSON in which no text can end the script element that holds it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plotted(name: str, run: RunData) -> dict[str, Any]:
    """What the page draws of a run."""
    account = run.account
    done = [each for each in account.stretches if each.last > each.first and each.until]
    done = [done[place] for place in evenly(len(done))]
    return {
        "name": name, "curves": curves_of(run.records), "tokens": tokens_of(run.records)[0],
        "seconds": {"step": [each.last for each in done], "value": [
            round(each.until, 2) for each in done]},
        "layers": layers_of(run.records), "intervals": _intervals(account),
        "starts": [round(start.begin, 1) for start in account.starts],
        "findings": [{"step": event["step"], "kind": str(event["kind"]).replace("_", " ")}
                     for event in run.findings if isinstance(event.get("step"), int)][:100],
        "measured": None if run.result is None else {
            "step": run.result["step"], "loss": short(run.result["loss"])},
    }


def _intervals(account: Account) -> list[list]:
    """[begin, end, phase], neighbours of one phase put together; of very many the longest."""
    merged: list[list] = []
    for begin, end, phase in account.intervals:
        if merged and merged[-1][2] == phase and begin - merged[-1][1] < 0.1:
            merged[-1][1] = round(end, 2)
        else:
            merged.append([round(begin, 2), round(end, 2), phase])
    longest = sorted(merged, key=lambda each: each[0] - each[1])[:MOST_INTERVALS]
    return sorted(longest)


CONTROLS = """<nav id="controls" hidden>
<span class="group" data-name="x" role="group" aria-label="horizontal axis"><button
 data-value="step" aria-pressed="true">steps</button><button data-value="tokens"
 aria-pressed="false">tokens</button><button data-value="seconds" aria-pressed="false">time</button
></span>
<span class="group toggles" role="group" aria-label="logarithmic axes"><button data-toggle="logX"
 aria-pressed="false">log x</button><button data-toggle="logY" aria-pressed="false">log y</button
></span><label>smoothing <input id="smoothing" type="range" min="0" max="95" value="0"></label>
</nav>"""


def _header(title: str, runs: list[RunData]) -> str:
    lines = []
    for run in runs if len(runs) == 1 else ():
        facts, start = run.account.starts[-1].facts, run.account.starts[0]
        state = "running" if run.state == RUNNING else "good" if run.state in (
            "done", "patience") else "bad"
        share = min(1.0, run.step / run.total_steps) if run.total_steps else 0.0
        device = f"{facts.get('devices', '?')} × {facts['device']}" if "device" in facts else ""
        about = " · ".join(filter(None, [
            device, f"started {in_utc(start.time)} UTC", str(facts.get("code", ""))]))
        lines.append(f'<p><span class="state {state}">{_escaped(state_in_words(run))}</span> '
                     f'<span class="about">{_escaped(about)}</span></p>'
                     f'<progress value="{share:.4f}" max="1"></progress>')
    return f"<header><h1>{_escaped(title)}</h1>{''.join(lines)}</header>"


def _cards(numbers: list[Number]) -> str:
    cards = [f'<div class="card"><dt>{_escaped(each.label)}</dt><dd>{_escaped(each.value)}'
             f"<small>{_escaped(each.note)}</small></dd></div>" for each in numbers]
    return f'<dl class="cards">{"".join(cards)}</dl>'


def _samples(names: list[str], runs: list[RunData]) -> str:
    """By step and prompt, the newest first; of several runs beside each other."""
    blocks = []
    for name, run in zip(names, runs, strict=True):
        for sample in sorted(run.samples, key=lambda sample: -sample["step"]):
            label = f"step {sample['step']:,}" if len(runs) == 1 else (
                f"{name}, step {sample['step']:,}")
            blocks.append(f"<figure><figcaption>{_escaped(label)}</figcaption><pre><mark>"
                          f"{_escaped(sample['prompt'])}</mark>{_escaped(sample['text'])}</pre>"
                          "</figure>")
    return f'<section><h2>Samples</h2><div class="samples">{"".join(blocks)}</div></section>' * (
        bool(blocks))


def _config(run: RunData) -> str:
    """What was chosen first, and all of it folded away."""
    def rows(names):
        return [[name, in_words(run.config[name])] for name in names]

    known = [name for name in run.config if run.chosen is None or name not in run.chosen]
    chosen = [name for name in run.config if name not in known]
    parts = ["<section><h2>Config</h2>"]
    if chosen:
        parts.append(_bare(["not at the default", "value"], rows(chosen)))
    title = "all other fields" if chosen else "all fields"
    parts.append(f"<details><summary>{title} ({len(known)})</summary>"
                 f"{_bare(['field', 'value'], rows(known))}</details></section>")
    return "".join(parts) if run.config else ""


def _table(table: Table) -> str:
    title, heads, rows = table
    return f"<section><h2>{_escaped(title)}</h2>{_bare(heads, rows)}</section>"


def _bare(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{_escaped(each)}</th>" for each in heads)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>'
            "</table></div>")


def _cell(text: str) -> str:
    kind = ' class="number"' if is_number(text) else ""
    return f"<td{kind}>{_escaped(text)}</td>"


def _escaped(text: str) -> str:
    return html.escape(str(text))
