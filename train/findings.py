"""A finding: what is wrong with a run, since when and where, why perhaps, and what to do."""

import dataclasses
import math
from typing import Any

from batiste.train.schedule import in_steps


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    kind: one of health.CLASSES. layer: the first in forward order for what activations do, in
    backward order for gradients, by depth from 0; None where it is no single layer's. parameter: its
    dotted name. examples: numbers of the records in the data set, the most suspicious first.
    evidence: numbers by name.
    """

    kind: str
    step: int
    layer: int | None
    parameter: str | None
    examples: tuple[int, ...]
    evidence: dict[str, float]
    cause: str
    remedy: str

    def line(self) -> str:
        """One line for a terminal."""
        where = [] if self.layer is None else [f"layer {self.layer}"]
        where += [] if self.parameter is None else [self.parameter]
        where += [] if not self.examples else [f"records {', '.join(map(str, self.examples[:4]))}"]
        evidence = ", ".join(f"{name} {value:.4g}" for name, value in self.evidence.items())
        return (f"{self.kind} at step {self.step:,}{' in ' if where else ''}{', '.join(where)}: "
                f"{evidence}. {self.cause} Try: {self.remedy}")

    def event(self) -> dict[str, Any]:
        """The fields of a ledger's event, in strict JSON: what is not finite is text."""
        evidence = {name: value if math.isfinite(value) else str(value)
                    for name, value in self.evidence.items()}
        return dataclasses.asdict(self) | {"evidence": evidence}

    @classmethod
    def from_event(cls, event: dict[str, Any]) -> "Finding":
        """The finding of a ledger's event."""
        fields = {field.name: event[field.name] for field in dataclasses.fields(cls)}
        evidence = {name: float(value) for name, value in event["evidence"].items()}
        return cls(**fields | {"examples": tuple(event["examples"]), "evidence": evidence})


@dataclasses.dataclass(frozen=True)
class Symptom:
    """A finding as a rule sees it: without its cause and its remedy.

    rows: of the batch. variant: which of several things of its class.
    """

    kind: str
    evidence: dict[str, float]
    layer: int | None = None
    parameter: str | None = None
    rows: tuple[int, ...] = ()
    variant: str = ""


def explain(symptom: Symptom, settings: dict[str, Any]) -> tuple[str, str]:
    """Probable cause and remedy of a symptom; settings: the flat config of the run."""
    causes = CAUSES[symptom.kind]
    cause, remedy = causes[symptom.variant] if isinstance(causes, dict) else causes
    rate = settings["train.schedule.learning_rate"]
    clip = settings["train.optimizer.clip_norm"]
    warmup = in_steps(settings["train.schedule.warmup_steps"], settings["train.num_steps"])
    values = {
        "half_rate": f"--config.train.schedule.learning_rate={rate / 2:g}",
        "rate": f"{rate:g}",
        "less_rate": f"--config.train.schedule.learning_rate={rate / 10:g}",
        "more_rate": f"--config.train.schedule.learning_rate={rate * 2:g}",
        "clip": f"--config.train.optimizer.clip_norm={1.0 if clip is None else clip / 2:g}",
        "warmup": f"--config.train.schedule.warmup_steps={max(2 * warmup, 100)}",
        "decay": "--config.train.optimizer.weight_decay="
                 f"{max(2 * settings['train.optimizer.weight_decay'], 0.1):g}",
        "dropout": f"--config.model.dropout={max(0.1, settings['model.dropout']):g}",
        "balance": "--config.train.objective.balance_loss="
                   f"{max(0.01, 2 * settings['train.objective.balance_loss']):g}",
        "policy": f"--config.train.health.policies={symptom.kind}",
        "group": _group(symptom),
    }
    return cause.format(**values), remedy.format(**values)


def _group(symptom: Symptom) -> str:
    if symptom.parameter is not None:
        return symptom.parameter
    first, last = (symptom.evidence.get(name) for name in ("first layer", "last layer"))
    if first is None:
        return "all parameters"
    return f"layer {first:.0f}" if first == last else f"layers {first:.0f} to {last:.0f}"


CAUSES: dict[str, Any] = {
    "not_finite": {
        "activation": ("The forward pass overflowed in this layer.",
                       "{half_rate}, or --config.model.qk_norm=True in a new run"),
        "gradient": ("The backward pass overflowed, first at this parameter.",
                     "{half_rate}; {policy}=roll_back if it comes again"),
        "loss": ("The loss overflowed after the last layer.",
                 "{half_rate}, or --config.train.objective.z_loss=1e-4"),
    },
    "loss_spike": ("The loss of most rows rose at once and the data look like before.",
                   "{half_rate} or {warmup}; {policy}=roll_back to pass it by"),
    "gradient_explosion": ("Gradients grew here first on the way back through the layers.",
                           "{clip}; if it comes again, {half_rate}"),
    "vanishing_gradients": ("Nothing is learned here: what this parameter makes no longer matters "
                            "to the loss, as when units are dead or a product with zeros follows.",
                            "{policy}=roll_back, then {half_rate}"),
    "activation_blow_up": ("The residual stream grew in this layer first.",
                           "{policy}=roll_back; {half_rate}; norms around blocks in a new run: "
                           "--config.model.norm_placement=sandwich"),
    "dead_units": ("These units of the feed-forward answer to no token of a batch.",
                   "{half_rate} or {warmup}; in a new run --config.model.activation=swiglu"),
    "attention": {
        "collapse": ("Heads of this layer look at one key alone.",
                     "{half_rate}; in a new run --config.model.qk_norm=True"),
        "saturation": ("Logits grew until the softmax is all or nothing and passes no gradient.",
                       "in a new run --config.model.qk_norm=True or "
                       "--config.model.attention_soft_cap=50; here {half_rate}"),
    },
    "router_collapse": ("The router of this layer sends tokens to few of its experts.",
                        "{balance}, or --config.model.router_bias=True in a new run"),
    "update_ratio": {
        "large": ("Steps are far larger than before beside the parameters: the learning rate of "
                  "{rate} is perhaps a typing error.", "{less_rate}"),
        "huge": ("From the start, steps are as large as the parameters: the learning rate of "
                 "{rate} is perhaps a typing error.", "{less_rate} or {warmup}"),
    },
    "frozen_layers": {
        "update": ("The gradient is there, and this does not move: {group}.",
                   "look for a multiplier of 0 among --config.train.optimizer.*_multiplier, or a "
                   "--config.train.faults that was left on"),
        "gradient": ("No gradient arrives here at all: {group}.",
                     "look for a stop_gradient, an output that nothing reads, or a "
                     "--config.train.faults that was left on"),
    },
    "data_fault": {
        "repeated": ("One document fills several rows of the batch.",
                     "remove duplicates from --config.data.sources; {policy}=roll_back passes the "
                     "batches by"),
        "outlier": ("These rows are unlike all others: another language, or no text at all.",
                    "look at the records; {policy}=roll_back passes the batches by"),
        "garbage": ("The whole batch is unlike those before, and the model was well the step "
                    "before: another language, or no text at all.",
                    "look at the records; {policy}=roll_back passes the batches by"),
    },
    "wrong_targets": {
        "same": ("The targets are the inputs themselves: the model learns to copy.",
                 "look at what makes the batches: target t must be input t + 1"),
        "after": ("The targets are not the next tokens but those after them.",
                  "look at what makes the batches: target t must be input t + 1"),
        "other": ("The targets are not the next tokens of their rows: they belong to other places.",
                  "look at what makes the batches: target t must be input t + 1"),
    },
    "repeated_batch": ("The model is shown the same rows over and over: the input does not go on, or "
                       "the data set is not larger than a batch.",
                       "look at what yields the batches; more text in --config.data.sources; a "
                       "smaller --config.train.batch_size"),
    "plateau": ("The training loss no longer falls.",
                "{more_rate}, or a lower one if its curve is noisy; if the loss is good enough, "
                "--config.train.stop.patience=3"),
    "overfitting": ("The training loss falls and the validation loss rises.",
                    "--config.train.stop.patience=3; more text; {dropout}; {decay}"),
    "slow_input": {
        "input": ("Devices wait for batches.",
                  "put the data on a local disk; end what else uses the host's cores; "
                  "fewer, longer records: --config.data.sequence_length"),
        "host": ("Steps take longer than they did, and it is not the batches they wait for.",
                 "look for other processes and for a hot or slow machine; with several processes, "
                 "replace that host"),
    },
}
