"""What can go wrong with a run, and what is done about it: the classes, their policies, a finding."""

import dataclasses
import math

from batiste.fields import Config, check_types
from batiste.train.schedule import check_choice
from batiste.train.series import ENOUGH

POLICIES = ("log", "skip", "roll_back", "lower", "stop")
CLASSES = (
    "not_finite", "loss_spike", "gradient_explosion", "vanishing_gradients", "activation_blow_up",
    "dead_units", "attention", "router_collapse", "update_ratio", "frozen_layers", "data_fault",
    "wrong_targets", "repeated_batch", "plateau", "overfitting", "slow_input",
)
REPLICAS = "replicas_differ"  # Is no statistic of a step, and has policies of its own.
REPLICA_POLICIES = ("stop", "repair")
STOPS = "not_finite"  # Where nothing is said of it; every other class is said and nothing else.


def parse_policies(text: str) -> dict[str, str]:
    """What is done about each class: of those in "CLASS=POLICY,…" what it says.

    log: it is said, and nothing else. skip: the update of that very step is not made (not_finite
    alone: the step itself sees it). roll_back: the run continues from a checkpoint of before, and
    never reads the batches around the finding. lower: half the learning rate from there on. stop:
    the run ends with an error. ValueError, naming the field, for what cannot be.
    """
    name = "train.health.policies"
    policies = dict.fromkeys(CLASSES, "log") | {STOPS: "stop"}
    for said in text.split(",") if text else ():
        kind, _, policy = (part.strip() for part in said.partition("="))
        check_choice(f"{name}={text!r}", kind, (*CLASSES, REPLICAS))
        if kind == REPLICAS:
            check_choice(f"{name}={text!r}, what is done about {kind}", policy, REPLICA_POLICIES)
            continue
        check_choice(f"{name}={text!r}, what is done about {kind}", policy, POLICIES)
        if policy == "skip" and kind != "not_finite":
            raise ValueError(
                f"{name}={text!r}: a {kind} is known after the update is made, and cannot be "
                f"skipped; choose one of {', '.join(each for each in POLICIES if each != 'skip')}"
            )
        if policy not in ("log", "stop") and kind == "wrong_targets":
            raise ValueError(
                f"{name}={text!r}: wrong targets are wrong in every batch, and each process sees "
                "its own rows alone: wrong_targets can only be log or stop"
            )
        if policy != "log" and kind == "slow_input":
            raise ValueError(
                f"{name}={text!r}: each process has a clock of its own, and all must act alike: "
                "slow_input can only be log"
            )
        policies[kind] = policy
    return policies


def replica_policy(text: str) -> str:
    """What is done where replicas of the state differ: "stop", or "repair" from the majority."""
    said = [part.strip() for part in text.split(",")]
    return "repair" if f"{REPLICAS}=repair" in said else "stop"


@dataclasses.dataclass
class HealthConfig(Config):
    """How a run watches over itself.

    every: statistics are written and looked at every so many steps; None measures nothing, and the
    step is what it would be without. window: of how many looks a robust z-score is, at least
    16. roll_back: steps that a roll-back goes back at least, and whose batches are not read again.
    policies: what is done about which class, "loss_spike=roll_back,plateau=lower"; not_finite stops
    the run, and of others it is said, where this does not name them. replicas_every: devices that
    hold the same part of the state compare its bits every so many steps, and before each save; None
    never does, and "replicas_differ=repair" in policies copies what most of them have, instead of a
    stop.
    """

    every: int | None = 1
    window: int = 64
    roll_back: int = 8
    policies: str = ""
    replicas_every: int | None = 100

    def validate(self) -> None:
        """Raises ValueError, naming the field, if a field is out of its range."""
        check_types(self, "train.health.")
        for field, least, most in (
            ("every", 1, math.inf), ("window", ENOUGH, 100_000), ("roll_back", 1, math.inf),
            ("replicas_every", 1, math.inf),
        ):
            value = getattr(self, field)
            if value is not None and not least <= value <= most:
                at_most = "" if most == math.inf else f" and at most {most}"
                raise ValueError(f"train.health.{field}={value}: expected at least {least}{at_most}")
        parse_policies(self.policies)
