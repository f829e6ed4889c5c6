"""What can go wrong with a run, and what is done about it: the classes, their policies, a finding."""

import dataclasses

from batiste.train.schedule import check_choice

POLICIES = ("log", "skip", "roll_back", "lower", "stop")


@dataclasses.dataclass
class PoliciesConfig:
    """What is done about each class of finding.

    log: it is said, and nothing else. skip: the update of that very step is not made (not_finite
    alone: the step itself sees it). roll_back: the run continues from a checkpoint of before, and
    never reads the batches around the finding. lower: half the learning rate from there on. stop:
    the run ends with an error.
    """

    not_finite: str = "stop"
    loss_spike: str = "log"
    gradient_explosion: str = "log"
    vanishing_gradients: str = "log"
    activation_blow_up: str = "log"
    dead_units: str = "log"
    attention: str = "log"
    router_collapse: str = "log"
    update_ratio: str = "log"
    data_fault: str = "log"
    plateau: str = "log"
    overfitting: str = "log"

    def validate(self) -> None:
        """Raises ValueError, naming the field, for a policy that cannot be."""
        for field in dataclasses.fields(self):
            policy = getattr(self, field.name)
            name = f"train.health.policies.{field.name}"
            check_choice(name, policy, POLICIES)
            if policy == "skip" and field.name != "not_finite":
                raise ValueError(
                    f"{name}='skip': a {field.name} is known after the update is made; choose one of "
                    f"{', '.join(policy for policy in POLICIES if policy != 'skip')}"
                )


# A slow machine is said and nothing else: each process has a clock of its own, and all act alike.
CLASSES = (*(field.name for field in dataclasses.fields(PoliciesConfig)), "slow_input")


@dataclasses.dataclass
class HealthConfig:
    """How a run watches over itself.

    every: statistics are written and looked at every so many steps; None measures nothing, and the
    step is what it would be without. window: of how many looks a robust z-score is. roll_back: steps
    that a roll-back goes back at least, and whose batches are not read again.
    """

    every: int | None = 1
    window: int = 64
    roll_back: int = 8
    policies: PoliciesConfig = dataclasses.field(default_factory=PoliciesConfig)

    def validate(self) -> None:
        """Raises ValueError, naming the field, if a field is out of its range."""
        for field, least in (("every", 1), ("window", 8), ("roll_back", 1)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ValueError(f"train.health.{field}={value}: expected at least {least}")
        self.policies.validate()
