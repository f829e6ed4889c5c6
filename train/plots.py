"""Plots of a run from what it wrote down, as PNG in data URIs, so that a page has them in itself."""

import base64
import io
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from batiste.data.json_files import parse_json
from batiste.train.account import DOWN, LOST, Account
from batiste.train.event_kinds import check_record
from batiste.train.ledger import PHASES
from batiste.train.metrics import METRICS_FILE
from batiste.train.report import draw_losses

COLORS = dict(zip((*PHASES, LOST, DOWN), (
    "#8c8c8c", "#b5a7d6", "#6f9fd8", "#5b5ea6", "#e0b13c", "#2e8b57", "#74c2a8", "#c97b4a",
    "#9c6b98", "#d9d9d9", "#d64545", "#2b2b2b")))
MOST_COLUMNS = 400  # Of a heat map; further steps are left out evenly.


def read_records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """All records of metrics.jsonl, of whatever kind, as they are; torn lines are left out."""
    path = pathlib.Path(workdir, METRICS_FILE)
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else (), start=1):
        where = f"{path}, line {number}"
        try:
            record = parse_json(line, where, Any)
        except ValueError:
            continue
        check_record(record, where)
        records.append(record)
    return records


def draw_all(records: list[dict[str, Any]], account: Account) -> dict[str, str]:
    """The plots that there is something for, by title, as data URIs."""
    train = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "validation"]
    health = [record for record in records if record["kind"] == "health"]
    losses, held_out = _series(train, "loss"), _series(validation, "loss")
    drawn: dict[str, Callable[[Any], None]] = {
        "Timeline": lambda axes: _timeline(axes, account),
        "Goodput": lambda axes: _goodput(axes, account)}
    if losses:
        drawn["Loss"] = lambda axes: draw_losses(axes, losses, held_out)
    for title, name, label in (
        ("Learning rate", "learning_rate", "learning rate"),
        ("Throughput", "tokens_per_second", "tokens per second"),
        ("Norm of the gradient", "gradient_norm", "norm"),
    ):
        if points := _series(train, name):
            drawn[title] = lambda axes, points=points, label=label: _line(axes, points, label)
    for name in ("gradient", "update"):
        norms = norms_by_layer(health, name)
        if norms is not None:
            drawn[f"Norms by layer: {name}"] = lambda axes, norms=norms: _heat_map(axes, *norms)
    return {title: _image(draw) for title, draw in drawn.items()}


def norms_by_layer(
    health: list[dict[str, Any]], name: str
) -> tuple[list[int], list[str], np.ndarray] | None:
    """Steps, parameters (one by layer where they are stacked) and norms [parameter, step]."""
    rows: dict[str, dict[int, float]] = {}
    steps = [record["step"] for record in health if name in record]
    for record in health:
        for parameter, norm in record.get(name, {}).items():
            many = isinstance(norm, list)
            for layer, value in enumerate(norm if many else [norm]):
                row = f"{parameter}[{layer}]" if many else parameter
                rows.setdefault(row, {})[record["step"]] = float(value)
    if not rows:
        return None
    steps = steps[::max(1, math.ceil(len(steps) / MOST_COLUMNS))]
    values = [[rows[row].get(step, math.nan) for step in steps] for row in rows]
    return steps, list(rows), np.array(values)


def _series(records: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(record["step"], float(record[name])) for record in records if name in record]


def _line(axes: Any, points: list[tuple[int, float]], label: str) -> None:
    axes.plot(*zip(*points), color="#1f5582", linewidth=1.0)
    axes.set(xlabel="step", ylabel=label)


def _heat_map(axes: Any, steps: list[int], names: list[str], values: np.ndarray) -> None:
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = np.log10(values)
    finite = np.ma.masked_invalid(logarithms)
    image = axes.pcolormesh(steps, np.arange(len(names)), finite, shading="nearest", cmap="viridis")
    axes.figure.colorbar(image, label="log10 of the norm")
    axes.set_yticks(np.arange(len(names)), names, fontsize=max(3, min(8, 260 / len(names))))
    axes.invert_yaxis()
    axes.set(xlabel="step")


def _timeline(axes: Any, account: Account) -> None:
    for phase, color in COLORS.items():
        bars = [(begin, end - begin) for begin, end, each in account.intervals if each == phase]
        if bars:
            axes.broken_barh(bars, (0, 1), color=color, linewidth=0,
                             label=f"{phase} {account.seconds[phase]:,.1f} s")
    for index, start in enumerate(account.starts, start=1):
        axes.axvline(start.begin, color="black", linewidth=0.8)
        axes.text(start.begin, 1.03, f"{index}", fontsize=7, ha="center")
    axes.set(xlabel="seconds since the first start; starts are numbered", yticks=[], ylim=(0, 1.15),
             xlim=(0, account.starts[-1].end or 1))
    axes.spines["left"].set_visible(False)
    axes.legend(ncols=4, fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _goodput(axes: Any, account: Account) -> None:
    stretches = [each for each in account.stretches if each.last > each.first and each.until]
    done = np.cumsum([each.seconds for each in stretches])
    share = [100 * kept / each.until for kept, each in zip(done, stretches)]
    axes.plot([each.until for each in stretches], share, color="#2e8b57", linewidth=1.4)
    axes.set(xlabel="seconds since the first start", ylabel="goodput so far (%)", ylim=(0, 100),
             xlim=(0, account.starts[-1].end or 1))


def _image(draw: Callable[[Any], None]) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.5 s, and only reports draw
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
