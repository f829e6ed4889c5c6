"""From a stream of health records to findings: NumPy over a window, no device.

Norms are compared as logarithms, by robust z-scores over a window (median and median absolute
deviation) and by how many times their median they are; what is not finite needs no comparison.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from batiste.train.findings import Finding, Symptom, explain
from batiste.train.layer_rules import LayerRules, places
from batiste.train.loss_rules import ClockRules, LossRules

# A finding explains these if they come in the same look or soon after; they are not said again.
EXPLAINS = {
    "not_finite": ("loss_spike", "gradient_explosion", "activation_blow_up", "data_fault",
                   "update_ratio", "vanishing_gradients"),
    "activation_blow_up": ("loss_spike", "gradient_explosion", "data_fault", "attention",
                           "vanishing_gradients", "update_ratio"),
    "update_ratio": ("loss_spike", "gradient_explosion", "data_fault", "activation_blow_up",
                     "dead_units", "attention", "vanishing_gradients", "frozen_layers"),
    "wrong_targets": ("loss_spike", "gradient_explosion", "data_fault", "update_ratio", "plateau",
                      "overfitting", "vanishing_gradients"),
    "repeated_batch": ("data_fault", "plateau", "overfitting", "update_ratio",
                       "vanishing_gradients", "loss_spike"),
    "frozen_layers": ("update_ratio", "vanishing_gradients", "plateau"),
    "attention": ("frozen_layers",),
    "data_fault": ("loss_spike", "gradient_explosion", "update_ratio", "data_fault"),
    "gradient_explosion": ("loss_spike", "update_ratio", "data_fault"),
    "loss_spike": ("gradient_explosion", "data_fault"),
    "dead_units": ("vanishing_gradients", "loss_spike", "data_fault", "frozen_layers"),
}
SOON = 16  # Looks.


class Detector:
    """Looks at a run's records in order; equal records give equal findings.

    settings: the flat config of the run. examples: step -> numbers of the records in its batch, by
    row; None leaves them out. alone: whether no other process looks at rows of its own; where one
    does, what is seen of these explains nothing, so that all processes act alike.
    """

    def __init__(
        self, settings: dict[str, Any], examples: Callable[[int], Sequence[int]] | None = None,
        alone: bool = True,
    ):
        self._explains = EXPLAINS if alone else {
            kind: explained for kind, explained in EXPLAINS.items() if kind != "wrong_targets"}
        every, window = settings["train.health.every"], settings["train.health.window"]
        self._settings, self._examples, self._window = settings, examples, window
        self._layers = LayerRules(window, settings)
        self._losses = LossRules(window, settings["train.num_steps"] // every,
                                 next_tokens=settings.get("data.objectives") == [])
        self._clock = ClockRules(window)
        self._looks = 0
        self._seen: dict[tuple[str, int | None], int] = {}

    def observe(self, record: dict[str, Any]) -> list[Finding]:
        """Findings of one record (train/health_record.py), the most fundamental first."""
        self._looks += 1
        symptoms = _not_finite(record)
        if not symptoms:
            symptoms = self._layers.look(record)
            first = [*self._losses.targets(record), *self._losses.batch(record)]
            rows = self._losses.rows(record)
            causes = {symptom.kind for symptom in symptoms} & {"activation_blow_up", "update_ratio"}
            # A batch that is wrong explains gradients that are large; a model that is wrong explains
            # rows that are.
            symptoms = [*first, *symptoms, *rows] if causes else [*first, *rows, *symptoms]
            symptoms += self._losses.loss(record) + self._clock.look(record)
        return self._new(record["step"], symptoms)

    def remember(self, record: dict[str, Any]) -> None:
        """Takes in a record of long ago, of which only its loss still counts."""
        self._losses.remember(record["loss"])

    def observe_validation(self, step: int, loss: float) -> list[Finding]:
        """Findings of a validation loss, in nats per token."""
        return self._new(step, self._losses.validation(loss))

    def _new(self, step: int, symptoms: list[Symptom]) -> list[Finding]:
        """Those that no finding explains, and that were not there within a window."""
        findings = []
        for symptom in symptoms:
            explained = any(
                symptom.kind in self._explains.get(kind, ()) and self._looks - look < SOON
                for (kind, _), look in self._seen.items())
            place = symptom.kind, symptom.layer
            lasts = self._looks - self._seen.get(place, -self._window) < self._window
            if lasts or not explained:
                self._seen[place] = self._looks
            if not lasts and not explained:
                findings.append(self._finding(step, symptom))
        return findings

    def _finding(self, step: int, symptom: Symptom) -> Finding:
        cause, remedy = explain(symptom, self._settings)
        examples = ()
        if symptom.rows and self._examples is not None:
            numbers = self._examples(step)
            examples = tuple(int(numbers[row]) for row in symptom.rows)
        evidence = {name: float(value) for name, value in symptom.evidence.items()}
        return Finding(symptom.kind, step, symptom.layer, symptom.parameter, examples, evidence,
                       cause, remedy)


def _not_finite(record: dict[str, Any]) -> list[Symptom]:
    """Where numbers ceased to be numbers: forward first, then backward."""
    wrong = [not np.isfinite(rms + largest)
             for rms, largest in zip(record["rms"], record["largest"], strict=True)]
    rows = tuple(row for row, loss in enumerate(record["row_loss"]) if not np.isfinite(loss))
    evidence = {"loss": record["loss"], "gradient norm": record["gradient_norm"]}
    for name, layer in places(record["parameter"]):
        value = record["parameter"][name]
        if not np.isfinite(value if layer is None else value[layer]):
            return [Symptom("not_finite", evidence, layer, name, rows, "gradient")]
    if any(wrong):
        return [Symptom("not_finite", evidence, wrong.index(True), None, rows, "activation")]
    if not np.isfinite(record["loss"]):
        return [Symptom("not_finite", evidence, rows=rows, variant="loss")]
    for name, layer in places(record["gradient"]):
        value = record["gradient"][name]
        if not np.isfinite(value if layer is None else value[layer]):
            return [Symptom("not_finite", evidence, layer, name, rows, "gradient")]
    return []
