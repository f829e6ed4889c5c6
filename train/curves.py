"""Curves and heat maps of a run from its records, few enough points for a page to draw quickly."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from batiste.data.json_files import parse_json
from batiste.train.event_kinds import check_record
from batiste.train.metrics import HEALTH, METRICS_FILE
from batiste.train.report import smoothed

MOST_POINTS = 2000  # Of a curve; of more, the least and the greatest of each of so many / 2 parts.
MOST_COLUMNS = 240  # Of a heat map; further looks are left out evenly.
DIGITS = 5  # Significant ones of a number in the page.
BY_PARAMETER = ("gradient", "parameter", "update")
BY_LAYER = (
    "rms", "largest", "entropy", "logit", "dead", "router_load", "router_idle", "router_spread",
)
Curve = dict[str, list]  # {"step": [...], "value": [...]}


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


def curves_of(records: list[dict[str, Any]]) -> dict[str, Curve]:
    """Every number of the training and validation records by name, "train/loss" and so on.

    Of the training loss there is a smoothed one besides, "train/loss smoothed".
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record.get("kind") in ("train", "validation"):
            for name, value in record.items():
                if name not in ("step", "kind") and (number := as_number(value)) is not None:
                    points.setdefault(f"{record['kind']}/{name}", []).append(
                        (record["step"], number))
    curves = {name: thinned(*zip(*sorted(each))) for name, each in points.items()}
    if "train/loss" in points:
        steps, losses = zip(*sorted(points["train/loss"]))
        curves["train/loss smoothed"] = thinned(steps, smoothed(losses))
    return curves


def tokens_of(records: list[dict[str, Any]]) -> tuple[Curve, float]:
    """How many tokens had been trained on by which step, thinned, and in all."""
    # Records of before padding was left out count the targets that have a weight.
    train = {record["step"]: as_number(record.get("real_tokens", record.get("tokens"))) or 0.0
             for record in records if record.get("kind") == "train"}
    steps = sorted(train)
    sums = np.cumsum([train[step] for step in steps]) if steps else np.zeros(1)
    places = evenly(len(steps))
    return {"step": [steps[place] for place in places],
            "value": [float(sums[place]) for place in places]}, float(sums[-1])


def thinned(steps: Sequence[int], values: Sequence[float]) -> Curve:
    """A curve of at most MOST_POINTS: of each part of a longer one the least and the greatest."""
    values = np.asarray(values, float)
    places = np.arange(len(values))
    if len(values) > MOST_POINTS:
        low, high = np.where(np.isnan(values), np.inf, values), np.where(
            np.isnan(values), -np.inf, values)
        parts = np.array_split(places, MOST_POINTS // 2)
        places = np.unique([[part[np.argmin(low[part])], part[np.argmax(high[part])]]
                            for part in parts])
    return {"step": [int(steps[place]) for place in places],
            "value": [short(values[place]) for place in places]}


def layers_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Heat maps by layer and step: {"step": [...], "maps": {what: {"rows": [...], "z": [[...]]}}}.

    Of norms, "gradient" and so on, there is one of all matrices of a layer together and one of each
    stacked parameter; "update / parameter" is their ratio.
    """
    looks = [record for record in records
             if record.get("kind") == HEALTH and isinstance(record.get("gradient"), dict)]
    looks = [looks[place] for place in evenly(len(looks), MOST_COLUMNS)]
    maps: dict[str, dict[str, list]] = {}
    whole: dict[str, np.ndarray] = {}
    for kind in BY_PARAMETER:
        norms = _norms(looks, kind)
        if norms:
            rows, whole[kind] = _together(norms)
            maps[f"{kind} norm"] = _map(rows, whole[kind])
            maps |= {f"{kind} norm of {name}": _map([f"layer {layer}" for layer in range(len(each))],
                                                    each)
                     for name, each in norms.items() if len(each) > 1}
    if "update" in whole and whole["update"].shape == whole["parameter"].shape:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = whole["update"] / whole["parameter"]
        maps["update / parameter"] = _map(rows, ratio)
    for name in BY_LAYER:
        values = [record.get(name) for record in looks]
        if looks and all(isinstance(value, list) for value in values) and (
                len({len(value) for value in values}) == 1):
            each = np.array([[_float(one) for one in value] for value in values]).T
            maps[TITLES[name]] = _map([f"layer {layer}" for layer in range(len(each))], each)
    return {"step": [record["step"] for record in looks], "maps": maps}


TITLES = {
    "rms": "activation RMS", "largest": "largest activation", "entropy": "attention entropy",
    "logit": "largest attention logit", "dead": "silent units", "router_load": "busiest expert",
    "router_idle": "idle experts", "router_spread": "spread over experts",
}


def _norms(looks: list[dict[str, Any]], kind: str) -> dict[str, np.ndarray]:
    """Norms [layer, look] by parameter; of one layer where a parameter is not stacked."""
    found: dict[str, np.ndarray] = {}
    names = looks[0].get(kind) if looks else None
    for name in names if isinstance(names, dict) else ():
        columns = []
        for look in looks:
            value = look.get(kind, {}).get(name)
            columns.append([_float(one) for one in (value if isinstance(value, list) else [value])])
        if len({len(column) for column in columns}) == 1:
            found[name] = np.array(columns).T
    return found


def _together(norms: dict[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    """One row of all stacked parameters of each layer, and one of each parameter outside of them."""
    stacked = [each for each in norms.values() if len(each) > 1]
    outside = {name: each[0] for name, each in norms.items() if len(each) == 1}
    inside = np.sqrt(sum(np.square(each) for each in stacked)) if stacked else np.zeros((0, 0))
    before = [name for name in outside if "embedding" in name]
    after = [name for name in outside if name not in before]
    rows = [*before, *(f"layer {layer}" for layer in range(len(inside))), *after]
    return rows, np.array([*(outside[name] for name in before), *inside,
                           *(outside[name] for name in after)])


def _map(rows: list[str], values: np.ndarray) -> dict[str, list]:
    return {"rows": rows, "z": [[short(value, 3) for value in row] for row in values]}


def evenly(count: int, most: int = MOST_POINTS) -> list[int]:
    """At most `most` of `count` places, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def as_number(value: Any) -> float | None:
    """A number of a record, "nan" and "inf" included; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _float(value: Any) -> float:
    number = as_number(value)
    return math.nan if number is None else number


def short(value: float, digits: int = DIGITS) -> float | None:
    """The number with few digits, None where it is not finite: JSON has neither NaN nor infinity."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
