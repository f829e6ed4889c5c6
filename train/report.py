"""The report of a finished run: report.md and loss.png in its work directory."""

import dataclasses
import importlib.metadata
import math
import os
import pathlib
import platform
import re
from typing import Any

import numpy as np

from batiste.data.printable import printable
from batiste.train.metrics import read_metrics
from batiste.train.progress import duration

REPORT_FILE = "report.md"
CURVE_FILE = "loss.png"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu")


@dataclasses.dataclass
class ReportFacts:
    """What the report needs and metrics.jsonl does not hold. None: not measured.

    Bits per byte are of the held-out text; `standard_error` is theirs over documents. The two xz
    figures are `xz -9e` on the same text: all of it in one file, and each document on its own.
    """

    name: str
    parameters: int
    tokens: int
    device: str
    config: dict[str, Any]
    seconds_by_phase: dict[str, float]
    samples: list[tuple[str, str]]  # (prompt, text that followed)
    bits_per_byte: float | None = None
    standard_error: float | None = None
    xz_concatenated: float | None = None
    xz_per_document: float | None = None


def write_report(workdir: str | os.PathLike, facts: ReportFacts) -> pathlib.Path:
    """Writes loss.png and report.md from metrics.jsonl and `facts`; returns the path of report.md.

    Raises:
        ValueError: metrics.jsonl holds no training loss.
    """
    workdir = pathlib.Path(workdir)
    records = [record for record in read_metrics(workdir) if "loss" in record]
    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
    validation = [(r["step"], r["loss"]) for r in records if r["kind"] == "validation"]
    if not train:
        raise ValueError(f"{workdir}: expected training records with a loss in metrics.jsonl, got "
                         "none; check the work directory")
    draw_curve(workdir / CURVE_FILE, train, validation)
    sections = (_headline(facts, train, validation), _compression(facts), _samples(facts.samples),
                _seconds(facts.seconds_by_phase), _config(facts.config), _versions())
    path = workdir / REPORT_FILE
    text = "\n\n".join(section for section in sections if section) + "\n"
    path.write_text(printable(text), encoding="utf-8")
    return path


def draw_curve(path: pathlib.Path, train: list[tuple[int, float]],
               validation: list[tuple[int, float]]) -> None:
    """Draws the loss over steps as a PNG: training thin and smoothed, validation as points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.5 s, and only reports draw
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    draw_losses(figure.add_subplot(), train, validation)
    figure.savefig(path)


def draw_losses(axes: Any, train: list[tuple[int, float]],
                validation: list[tuple[int, float]]) -> None:
    """Draws the same on axes of matplotlib."""
    steps, losses = zip(*train)
    axes.plot(steps, losses, color="#9db8cf", linewidth=0.6, label="training, each step")
    axes.plot(steps, smoothed(losses), color="#1f5582", linewidth=1.8, label="training, smoothed")
    if validation:
        axes.plot(*zip(*validation), color="#c8501e", marker="o", markersize=4, linewidth=0.8,
                  label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def smoothed(losses: tuple[float, ...]) -> np.ndarray:
    """Returns the moving average over about 1/25 of the run, centred so that it does not lag.

    The window shrinks towards both ends to stay centred. Losses that are not finite are left out.
    """
    values, steps = np.asarray(losses), np.arange(len(losses))
    finite = np.isfinite(values)
    half = np.minimum(len(losses) // 50, np.minimum(steps, steps[::-1]))

    def window_sums(x):
        sums = np.concatenate([[0.0], np.cumsum(x)])
        return sums[steps + half + 1] - sums[steps - half]

    counts = window_sums(finite)
    return np.where(counts > 0, window_sums(np.where(finite, values, 0)) / np.maximum(counts, 1),
                    np.nan)


def _headline(facts: ReportFacts, train: list[tuple[int, float]],
              validation: list[tuple[int, float]]) -> str:
    lines = [f"# {facts.name}", "",
             f"{facts.parameters:,} parameters, {facts.tokens:,} tokens, {facts.device}.", "",
             f"![Training and validation loss over steps]({CURVE_FILE})", ""]
    last_step, last_loss = train[-1]
    lines.append(f"Last training loss: {last_loss:.4f} nats per token (step {last_step:,}).")
    if validation:
        step, loss = min(validation, key=lambda point: (math.isnan(point[1]), point[1]))
        lines.append(f"Best validation loss: **{loss:.4f}** nats per token (step {step:,}).")
    return "\n".join(lines)


def _compression(facts: ReportFacts) -> str:
    rows = [("this model", facts.bits_per_byte, facts.standard_error),
            ("`xz -9e`, all documents in one file", facts.xz_concatenated, None),
            ("`xz -9e`, each document on its own", facts.xz_per_document, None)]
    lines = []
    for name, bits, error in rows:
        if bits is not None:
            lines.append(f"| {name} | {bits:.3f}" + (f" ± {error:.3f}" if error else "") + " |")
    if not lines:
        return ""
    return "\n".join(["## Bits per byte of the held-out text", "",
                      "Fewer is better; ± is one standard error.", "",
                      "| coder | bits per byte |", "|---|---|", *lines])


def _samples(samples: list[tuple[str, str]]) -> str:
    blocks = []
    for prompt, text in samples:
        blocks.append(f"Prompt:\n\n{_fenced(prompt)}\n\nContinuation:\n\n{_fenced(text)}")
    return "\n\n".join(["## Samples", *blocks]) if blocks else ""


def _fenced(text: str) -> str:
    """A Markdown code block whose fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0)
    return f"{fence}text\n{text}\n{fence}"


def _seconds(seconds_by_phase: dict[str, float]) -> str:
    total = sum(seconds_by_phase.values())
    rows = [f"| {phase} | {seconds:,.1f} | {seconds / total:.1%} |"
            for phase, seconds in seconds_by_phase.items() if total]
    return "\n".join(["## Time", "", f"{duration(total)} in all.", "",
                      "| phase | seconds | share |", "|---|---|---|", *rows])


def _config(config: dict[str, Any]) -> str:
    rows = [f"| `{name}` | `{value}` |" for name, value in config.items()]
    return "\n".join(["## Config", "", "| field | value |", "|---|---|", *rows])


def _versions() -> str:
    rows = [f"| Python | {platform.python_version()} |"]
    for package in PACKAGES:
        try:
            rows.append(f"| {package} | {importlib.metadata.version(package)} |")
        except importlib.metadata.PackageNotFoundError:
            continue  # libtpu is on TPU machines only
    return "\n".join(["## Software", "", "| package | version |", "|---|---|", *rows])
