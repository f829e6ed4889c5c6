"""What was wrong with a run, from what its work directory holds: findings, text, plots."""

import os
import pathlib
from typing import Any

import numpy as np

from batiste.train.detector import Detector
from batiste.train.findings import Finding
from batiste.train.health import HealthConfig
from batiste.train.ledger import LEDGER_FILE, read_ledger
from batiste.train.metrics import read_all
from batiste.train.run_data import read_flat_config
from batiste.train.thinning import is_thinned

# What is read of a run's config, without the config classes of later rooms.
CONFIG = {
    "model": {"dropout": float, "num_experts": int | None, "experts_per_token": int},
    "train": {
        "num_steps": int, "schedule": {"learning_rate": float, "warmup_steps": float},
        "health": {"every": int | None, "window": int}, "objective": {"balance_loss": float},
        "optimizer": {"clip_norm": float | None, "weight_decay": float, **{
            f"{group}_multiplier": float for group in ("embedding", "head", "matrix", "vector")}},
    },
}
MAY_BE_NULL = dict.fromkeys(
    ("train.health.every", "train.optimizer.clip_norm", "model.num_experts"))
DIAGNOSIS_FILE = "doctor.md"
PICTURE_FILE = "doctor.png"


def diagnose(workdir: str | os.PathLike) -> list[Finding]:
    """The findings of a run, by step: those that it wrote down, and those that its records show.

    Nothing of it needs a device. What both have is the run's own, which knows the records of the
    data. Raises ValueError where there is no run.
    """
    workdir = pathlib.Path(workdir)
    settings = MAY_BE_NULL | read_flat_config(workdir, CONFIG)
    if not (workdir / "config.json").is_file():
        raise ValueError(f"workdir={workdir}: no config.json there, so no run; expected the "
                         "--workdir of a `batiste train`")
    found = {(finding.kind, finding.step): finding for finding in _written(workdir)}
    HealthConfig(settings["train.health.every"], settings["train.health.window"]).validate()
    if settings["train.health.every"] is not None:
        detector = Detector(settings)
        records = read_all(workdir)
        # Whole looks between thinned ones are of different times, and compare with nothing.
        last_thinned = max((record["step"] for record in records
                            if record["kind"] == "health" and is_thinned(record)), default=-1)
        for record in records:
            try:
                new = _look(detector, record, last_thinned)
            except (ArithmeticError, LookupError, StopIteration, TypeError, ValueError) as error:
                raise ValueError(
                    f"{workdir}/metrics.jsonl: the {record['kind']} record of step {record['step']} "
                    f"does not go with those before: {type(error).__name__}: {error}") from error
            for finding in new:
                found.setdefault((finding.kind, finding.step), finding)
    return sorted(found.values(), key=lambda finding: finding.step)


def _look(detector: Detector, record: dict[str, Any], last_thinned: int) -> list[Finding]:
    """What the detector finds in a record of any kind; up to a step it only remembers looks."""
    if record["kind"] == "health" and record["step"] <= last_thinned:
        detector.remember(record)
    elif record["kind"] == "health":
        return detector.observe(record)
    elif record["kind"] == "validation":
        return detector.observe_validation(record["step"], record["loss"])
    return []


def _written(workdir: pathlib.Path) -> list[Finding]:
    events = read_ledger(workdir) if (workdir / LEDGER_FILE).is_file() else []
    return [Finding.from_event(event) for event in events if event["event"] == "finding"]


def write_diagnosis(workdir: str | os.PathLike) -> str:
    """The findings as Markdown; writes it and its plots into the work directory, too."""
    workdir = pathlib.Path(workdir)
    findings = diagnose(workdir)
    records = [record for record in read_all(workdir)
               if record["kind"] == "health" and not is_thinned(record)]
    lines = [f"# Health of {workdir.name}", ""]
    if records:
        lines += [f"{len(records):,} looks, up to step {records[-1]['step']:,}; "
                  f"{len(findings)} findings.", ""]
    else:
        lines += [f"No statistics there (train.health.every=None); {len(findings)} findings.", ""]
    if findings:
        lines += ["| step | class | where | evidence |", "|---|---|---|---|"]
        lines += [_row(finding) for finding in findings] + [""]
    for finding in findings:
        lines += [f"- step {finding.step:,}, {finding.kind}: {finding.cause} Try: {finding.remedy}"]
    if records:
        draw(workdir / PICTURE_FILE, records, findings)
        lines += ["", f"![Loss, gradients and activations by layer]({PICTURE_FILE})"]
    text = "\n".join(lines) + "\n"
    (workdir / DIAGNOSIS_FILE).write_text(text, encoding="utf-8")
    return text


def _row(finding: Finding) -> str:
    where = [] if finding.layer is None else [f"layer {finding.layer}"]
    where += [] if finding.parameter is None else [f"`{finding.parameter}`"]
    where += [f"records {', '.join(map(str, finding.examples[:8]))}"] if finding.examples else []
    evidence = ", ".join(f"{name} {value:.4g}" for name, value in finding.evidence.items())
    return f"| {finding.step:,} | {finding.kind} | {', '.join(where)} | {evidence} |"


def draw(path: pathlib.Path, records: list[dict[str, Any]], findings: list[Finding]) -> None:
    """Draws the loss, and as heat maps by layer the norms of gradients and the RMS of activations.

    Findings are vertical lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.5 s, and only reports draw
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss, gradient, activation = figure.subplots(3, sharex=True)
    steps = np.array([record["step"] for record in records])
    loss.plot(steps, [record["loss"] for record in records], color="#1f5582", linewidth=0.8)
    loss.set_ylabel("loss (nats per token)")
    stacked = [name for name, norm in records[0]["gradient"].items() if isinstance(norm, list)]
    norms = np.array([[record["gradient"][name] for name in stacked] for record in records])
    maps = ((gradient, np.sqrt(np.square(norms).sum(axis=1)), "gradient norm"),
            (activation, np.array([record["rms"] for record in records]), "RMS after block"))
    edges = np.append(steps, steps[-1] + 1)
    for axes, values_SL, name in maps:
        shown = np.log10(np.maximum(values_SL, 1e-12)).T
        layers = np.arange(shown.shape[0] + 1) - 0.5
        drawn = axes.pcolormesh(edges, layers, np.ma.masked_invalid(shown), cmap="viridis")
        figure.colorbar(drawn, ax=axes, label=f"log10 of the {name}")
        axes.set_ylabel("layer")
        axes.yaxis.get_major_locator().set_params(integer=True)
    for finding in findings:
        for axes in (loss, gradient, activation):
            axes.axvline(finding.step, color="#c8501e", linewidth=0.8)
    activation.set_xlabel("step")
    figure.savefig(path)
