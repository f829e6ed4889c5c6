"""What the statistics of layers and parameters say is wrong, each look compared with those before."""

from typing import Any

import numpy as np

from batiste.train.findings import Symptom
from batiste.train.optimizer import parameter_group
from batiste.train.router_rules import RouterRules
from batiste.train.series import ENOUGH, IN_A_ROW, Runs, Series

FAR = 8.0  # Robust standard deviations.
TIMES = 10.0  # How many times its median a norm must be, besides, to be an explosion.
# A restless past hides what is far beyond it: 27 times the median may be 7 deviations of it.
MANY_TIMES, RESTLESS = 20.0, 4.0  # Times the median; robust standard deviations.
STILL = 1e-6  # Of the median ratio of update to parameter.
BEGUN = 3.0  # Where it began is the first place with as many times its median.
SPREAD = 0.05  # Least standard deviation of a norm, in decades.
VANISHED = 1e-3  # Of its median.
DEAD, DEAD_GROWTH = 0.5, 0.3  # Fraction of units; how much of it is new.
ONE_KEY = 0.05  # Attention's entropy over its maximum.
SATURATED = 100.0  # Logit from which Kimi K2 clips queries and keys (arXiv:2507.20534).
HUGE = 0.5  # Update over parameter.


def places(norms: dict[str, Any]) -> list[tuple[str, int | None]]:
    """Parameters and layers in backward order: head, layers from the last, embeddings."""
    stacked = {name: norm for name, norm in norms.items() if isinstance(norm, list)}
    outside = [name for name in norms if name not in stacked]
    first = [name for name in outside if parameter_group(letters_of(name)) != "embedding"]
    last = [name for name in outside if name not in first]
    depth = len(next(iter(stacked.values())))
    inside = sorted(stacked, key=_backward_rank)
    layers = [(name, layer) for layer in reversed(range(depth)) for name in inside]
    return [*((name, None) for name in first), *layers, *((name, None) for name in last)]


def _backward_rank(name: str) -> tuple[bool, bool, str]:
    return ".attention" in name, not (".down_" in name or ".out_" in name), name


def letters_of(name: str) -> str:
    """The letters of a parameter by its dotted name, without the L of a stack."""
    return name.rsplit("_", 1)[1]


class LayerRules:
    """Looks at records in order; `look` returns what is wrong in each.

    settings: the flat config of the run. window: looks to compare with.
    """

    def __init__(self, window: int, settings: dict[str, Any]):
        self._settings, self._runs = settings, Runs()
        self._router = RouterRules(settings)
        self._where: list[tuple[str, int | None]] | None = None
        self._series = {name: Series(window) for name in (
            "gradient_norm", "whole", "gradient", "ratio", "rms", "largest", "dead")}

    def look(self, record: dict[str, Any]) -> list[Symptom]:
        """Symptoms of one record, all of whose numbers are finite."""
        if self._where is None:
            self._where = places(record["gradient"])
            self._groups = np.array([parameter_group(letters_of(name)) for name, _ in self._where])
            self._meant = np.array([
                self._settings[f"train.optimizer.{group}_multiplier"] > 0 for group in self._groups])
        where = self._where
        gradient, parameter, update = (
            np.array([_at(record[kind], place) for place in where])
            for kind in ("gradient", "parameter", "update"))
        matrix = self._groups != "vector"
        ratio = np.where(matrix & (parameter > 0), update / np.maximum(parameter, 1e-30), np.nan)
        by_layer = {name: np.array(record[name]) for name in
                    ("rms", "largest", "entropy", "dead", "logit", "router_load", "router_idle",
                     "router_spread")
                    if name in record}
        symptoms = [
            *self._activations(by_layer), *self._units(by_layer),
            *self._gradients(where, gradient, matrix), *self._updates(where, ratio),
            *self._attention(by_layer), *self._router.look(by_layer),
            *self._frozen(record, where, ratio, matrix & self._meant & (gradient == 0)),
        ]
        self._push("gradient_norm", _decades(self._without_tables(gradient)))
        self._push("whole", _decades(np.sqrt(np.square(gradient).sum())))
        self._push("gradient", _decades(gradient))
        self._push("ratio", _decades(np.where(np.isnan(ratio), 1, ratio)))
        for name in ("rms", "largest"):
            self._push(name, _decades(by_layer[name]))
        return symptoms

    def _push(self, name: str, values: np.ndarray) -> None:
        self._series[name].push(values)

    def _known(self, name: str) -> bool:
        return len(self._series[name]) >= ENOUGH

    def _times(self, name: str, values: np.ndarray, far: float = FAR) -> np.ndarray:
        """How many times the median, 1 where that is not far beyond the usual."""
        series, now = self._series[name], _decades(values)
        return np.where(series.z(now, SPREAD) > far, 10 ** (now - series.median), 1.0)

    def _without_tables(self, gradient: np.ndarray) -> np.ndarray:
        """The norm of all but embeddings, whose own a rare token multiplies by 50 in healthy runs."""
        return np.sqrt(np.square(gradient[self._groups != "embedding"]).sum())

    def _activations(self, by_layer) -> list[Symptom]:
        if not self._known("rms"):
            return []
        times_L = np.maximum(self._times("rms", by_layer["rms"]),
                             self._times("largest", by_layer["largest"]))
        if times_L.max() < TIMES:
            return []
        layer = int(np.argmax(times_L >= BEGUN))
        evidence = {"times the median": times_L[layer], "rms": by_layer["rms"][layer],
                    "largest": by_layer["largest"][layer]}
        return [Symptom("activation_blow_up", evidence, layer)]

    def _gradients(self, where, gradient, matrix) -> list[Symptom]:
        if not self._known("gradient"):
            return []
        found = []
        norm, whole = self._without_tables(gradient), np.sqrt(np.square(gradient).sum())
        times = float(self._times("gradient_norm", norm))
        # What clips the whole step is said however restless its past, tables included.
        if times < TIMES and self._times("whole", whole, RESTLESS) >= MANY_TIMES:
            norm, times = whole, float(self._times("whole", whole, RESTLESS))
        if times >= TIMES:
            grown = self._times("gradient", gradient, RESTLESS)
            begun = np.nonzero(grown >= BEGUN)[0]
            parameter, layer = where[begun[0]] if len(begun) else (None, None)
            evidence = {"gradient norm": float(norm), "times the median": times}
            found.append(Symptom("gradient_explosion", evidence, layer, parameter))
        usual = 10 ** self._series["gradient"].median
        gone = matrix & (gradient < VANISHED * usual) & (gradient > 0)  # None at all: `_frozen`.
        lasting = self._runs.add("vanished", gone) >= IN_A_ROW
        if lasting.any():
            place = int(np.argmax(lasting))
            parameter, layer = where[place]
            evidence = {"gradient norm": gradient[place], "its median": usual[place]}
            found.append(Symptom("vanishing_gradients", evidence, layer, parameter))
        return found

    def _frozen(self, record, where, ratio, without_gradient) -> list[Symptom]:
        """What does not move, needing no past; rates of 0 and groups frozen on purpose are not."""
        least = max(1e-9, STILL * float(np.nanmedian(ratio)))
        still = (ratio < least) & self._meant & (record["learning_rate"] > 0)
        # What is still all zeros has no ratio, and may not have had its turn.
        moving = np.isfinite(ratio)
        for variant, wrong in (("gradient", without_gradient & moving), ("update", still & moving)):
            lasting = self._runs.add(f"frozen {variant}", wrong) >= IN_A_ROW
            if lasting.any():
                return [_layers(where, lasting, ratio, variant)]
        return []

    def _updates(self, where, ratio) -> list[Symptom]:
        """What is out of range."""
        found = []
        huge = self._runs.add("huge", ratio > HUGE) >= IN_A_ROW
        large = np.zeros(len(where), bool)
        if self._known("ratio"):
            times = self._times("ratio", np.where(np.isnan(ratio), 1, ratio))
            large = (times >= TIMES) & (ratio > 1e-3)
        if large.any():
            found.append(_somewhere(where, large, ratio, "large", times))
        elif huge.any():
            found.append(_somewhere(where, huge, ratio, "huge"))
        return found

    def _units(self, by_layer) -> list[Symptom]:
        if "dead" not in by_layer:
            return []
        dead_L = by_layer["dead"]
        usual_L = self._series["dead"].median if self._known("dead") else np.zeros(len(dead_L))
        dying_L = (dead_L >= DEAD) & (dead_L - usual_L >= DEAD_GROWTH)
        # What was usual before stays so, however long it lasts.
        self._push("dead", np.where(dying_L, usual_L, dead_L))
        lasting = self._runs.add("dead", dying_L) >= IN_A_ROW
        if not lasting.any():
            return []
        layer = int(np.argmax(lasting))
        evidence = {"dead fraction": dead_L[layer], "before": usual_L[layer]}
        return [Symptom("dead_units", evidence, layer, "layers.feed_forward")]

    def _attention(self, by_layer) -> list[Symptom]:
        if "entropy" not in by_layer:
            return []
        entropy_L, logit_L = by_layer["entropy"], by_layer["logit"]
        saturated = self._runs.add("saturated", logit_L > SATURATED) >= IN_A_ROW
        alone = self._runs.add("one key", entropy_L < ONE_KEY) >= IN_A_ROW
        for variant, lasting in (("saturation", saturated), ("collapse", alone)):
            if lasting.any():
                layer = int(np.argmax(lasting))
                evidence = {"entropy over its maximum": entropy_L[layer],
                            "largest logit": logit_L[layer]}
                return [Symptom("attention", evidence, layer, "layers.attention", variant=variant)]
        return []


def _at(norms: dict[str, Any], place: tuple[str, int | None]) -> float:
    name, layer = place
    return norms[name] if layer is None else norms[name][layer]


def _decades(values: np.ndarray) -> np.ndarray:
    return np.log10(np.maximum(values, 1e-30))


def _layers(where, wrong, ratio, variant) -> Symptom:
    """The layers all of whose matrices are wrong; one place where there is no such layer."""
    compared = np.isfinite(ratio)
    indices = np.nonzero(wrong)[0]
    by_layer: dict[int, list[bool]] = {}
    for (_, layer), bad, counts in zip(where, wrong, compared):
        if layer is not None and counts:
            by_layer.setdefault(layer, []).append(bool(bad))
    layers = sorted(layer for layer, each in by_layer.items() if all(each))
    evidence = {"update over parameter": float(np.median(ratio[indices])),
                "matrices": float(len(indices)), "of": float(compared.sum())}
    if len(indices) == compared.sum():
        return Symptom("frozen_layers", evidence, variant=variant)
    if not layers:
        parameter, layer = where[indices[-1]]
        return Symptom("frozen_layers", evidence, layer, parameter, variant=variant)
    evidence |= {"layers": len(layers), "first layer": layers[0], "last layer": layers[-1]}
    return Symptom("frozen_layers", evidence, layers[0], variant=variant)


def _somewhere(where, wrong, ratio, variant, times=None) -> Symptom:
    """The place in forward order; no single one if more than half of the matrices are wrong."""
    indices = np.nonzero(wrong)[0]
    evidence = {"update over parameter": float(np.nanmedian(ratio[indices])),
                "matrices": float(len(indices))}
    if times is not None:
        evidence["times the median"] = float(np.median(times[indices]))
    everywhere = len(indices) > np.isfinite(ratio).sum() / 2
    parameter, layer = (None, None) if everywhere else where[indices[-1]]
    return Symptom("update_ratio", evidence, layer, parameter, variant=variant)
