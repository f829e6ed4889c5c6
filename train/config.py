"""What a training run does: steps, optimizer, objective, checkpoints, when to evaluate and stop."""

import dataclasses

from batiste.fields import Config, check_types
from batiste.train.faults import parse_fault
from batiste.train.health import HealthConfig
from batiste.train.local_steps import LocalStepsConfig
from batiste.train.optimizer import OptimizerConfig
from batiste.train.precision import LossScaleConfig
from batiste.train.schedule import ScheduleConfig, make_schedule


@dataclasses.dataclass
class ObjectiveConfig(Config):
    """The loss, and how much of it is computed at a time.

    loss_chunk: logits are computed for so many positions of each row at a time, and never all at
    once; None computes all.
    fused: the kernels of model.attention's chip compute the loss, logits are never in memory, and
    loss_chunk says nothing.
    balance_loss, router_z_loss: weights of the losses of each layer's router (models/router.py).
    """

    label_smoothing: float = 0.0  # share of the target that all tokens get alike, in [0, 1)
    z_loss: float = 0.0  # weight of the squared log of the softmax's sum (arXiv:2204.02311)
    loss_chunk: int | None = None
    fused: bool = False
    balance_loss: float = 0.0
    router_z_loss: float = 0.0


@dataclasses.dataclass
class CheckpointConfig(Config):
    """When to save: every `every` steps. What to keep: the last `keep`, and more if asked.

    keep_every: also each step that is a multiple. keep_best: also so many of the lowest validation
    loss. max_failures: so many saves that fail in a row stop the run; None never does.
    """

    every: int = 100  # steps between two checkpoints
    keep: int = 2  # the last so many are kept
    keep_every: int | None = None
    keep_best: int | None = None
    max_failures: int | None = 5


@dataclasses.dataclass
class EvaluationConfig(Config):
    """When to measure the validation loss: every `every` steps, over at most `max_batches`."""

    every: int = 100  # steps between two measurements of the validation loss
    max_batches: int | None = None  # batches of a measurement; None: all there are
    samples: bool = False  # continue sample.prompts each time, too, for the report


@dataclasses.dataclass
class StopConfig(Config):
    """Early stopping: after `patience` evaluations without a better loss; at a budget of FLOPs."""

    patience: int | None = None  # evaluations without a better validation loss; None: no limit
    flops: float | None = None  # floating-point operations of the whole run; None: no limit


@dataclasses.dataclass
class TrainConfig(Config):
    """`batch_size` is in sequences, over all devices; `accumulation` splits it in time.

    faults: what to do to a run on purpose (train/faults.py).
    """

    seed: int = 0  # of the initial parameters, dropout and what else is drawn in a step
    num_steps: int = 1000  # updates of the whole run
    batch_size: int = 16  # sequences of a step, over all devices
    accumulation: int = 1  # parts of a batch that are computed one after another
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    loss_scale: LossScaleConfig = dataclasses.field(default_factory=LossScaleConfig)
    local: LocalStepsConfig = dataclasses.field(default_factory=LocalStepsConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    stop: StopConfig = dataclasses.field(default_factory=StopConfig)
    health: HealthConfig = dataclasses.field(default_factory=HealthConfig)
    faults: str | None = None

    @property
    def measures(self) -> bool:
        """Whether steps compute statistics of their health; local steps do not."""
        return self.health.every is not None and self.local.steps is None

    def validate(self) -> None:
        """Raises ValueError, naming the field and a fix, for a run that cannot be."""
        check_types(self, "train.")
        self.optimizer.validate()
        make_schedule(self.schedule, self.num_steps)
        self.loss_scale.validate()
        self.local.validate()
        self.health.validate()
        if parse_fault(self.faults) is not None and self.local.steps is not None:
            raise ValueError("train.faults knows no local steps: set train.local.steps=None")
        positive = {
            "num_steps": self.num_steps, "batch_size": self.batch_size,
            "accumulation": self.accumulation, "objective.loss_chunk": self.objective.loss_chunk,
            "checkpoint.every": self.checkpoint.every, "checkpoint.keep": self.checkpoint.keep,
            "checkpoint.keep_every": self.checkpoint.keep_every,
            "checkpoint.keep_best": self.checkpoint.keep_best,
            "checkpoint.max_failures": self.checkpoint.max_failures,
            "evaluation.every": self.evaluation.every,
            "evaluation.max_batches": self.evaluation.max_batches,
            "stop.patience": self.stop.patience, "stop.flops": self.stop.flops,
        }
        for field, value in positive.items():
            if value is not None and value <= 0:
                raise ValueError(f"train.{field}={value}: expected a positive number")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"train.accumulation={self.accumulation} must divide train.batch_size="
                f"{self.batch_size}"
            )
        if not 0 <= self.objective.label_smoothing < 1:
            raise ValueError(
                f"train.objective.label_smoothing={self.objective.label_smoothing}: expected "
                "0 <= label_smoothing < 1"
            )
        for field in ("z_loss", "balance_loss", "router_z_loss"):
            value = getattr(self.objective, field)
            if value < 0:
                raise ValueError(f"train.objective.{field}={value}: expected >= 0")
