"""What a task trains and how: its heads, and the numbers of the run."""

import dataclasses
import math

from batiste.fields import Config, check_types
from batiste.sharding import MeshConfig
from batiste.train import TrainConfig
from batiste.train.config import CheckpointConfig, EvaluationConfig
from batiste.train.health import HealthConfig
from batiste.train.optimizer import OptimizerConfig
from batiste.train.schedule import ScheduleConfig, check_choice

KINDS = ("sequence", "multilabel", "tags", "span", "similarity")
POOLS = ("mean", "first", "last")
# The fields that only some kinds read: refused (not ignored) elsewhere.
READ_BY = {
    "pool": ("sequence", "multilabel", "similarity"),
    "class_weights": ("sequence", "tags"),
    "balanced_loss": ("sequence", "tags"),
    "focal": ("sequence", "multilabel", "tags"),
    "temperature": ("similarity",),
    "longest": ("span",),
}
DEFAULTS = {"pool": "mean", "temperature": 0.05, "longest": 30}


@dataclasses.dataclass
class HeadConfig(Config):
    """One thing to learn; `weight` is that of its loss among the others.

    kind: "sequence" is one of `classes` for a text, "multilabel" any of them, "tags" one for each
    word, "span" where in a text the answer is, "similarity" which texts belong together.
    classes: their names, in the order of the logits.
    pool: which vector stands for a text: the mean over its tokens, its first or its last token's
    (None: the mean). class_weights: what each class's losses are multiplied by, in the order of
    `classes`; balanced_loss makes them n / (classes * count). focal: gamma of the focal loss (Lin
    et al. 2017, arXiv:1708.02002), 0 is cross-entropy. temperature: cosines are divided by it
    before the softmax over the batch (None: 0.05). longest: tokens of the longest answer (None: 30).
    """

    name: str = "label"  # what its metrics, and its labels in the examples, are called
    kind: str = "sequence"
    classes: tuple[str, ...] = ()
    weight: float = 1.0  # of its loss among those of the other heads
    pool: str | None = None
    class_weights: tuple[float, ...] | None = None
    balanced_loss: bool = False  # class_weights are n / (classes * count)
    focal: float = 0.0
    temperature: float | None = None
    longest: int | None = None

    def given(self, field: str):
        """The value of a field of DEFAULTS, or what it is where None is given."""
        value = getattr(self, field)
        return DEFAULTS[field] if value is None else value

    def validate(self, place: str) -> None:
        """Raises ValueError, naming `place` and the field, for a head that cannot be."""
        check_types(self, f"{place}.")
        if not self.name.isidentifier():
            raise ValueError(f"{place}.name={self.name!r}: expected a name of letters and digits")
        check_choice(f"{place}.kind", self.kind, KINDS)
        for field, kinds in READ_BY.items():
            value = getattr(self, field)
            if self.kind not in kinds and value not in (None, 0):
                raise ValueError(f"{place}.{field}={value!r}: only kind {' or '.join(kinds)} reads "
                                 f"it and kind is {self.kind}: leave it out")
        if self.pool is not None:
            check_choice(f"{place}.pool", self.pool, POOLS)
        for field in ("weight", "temperature", "longest"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{place}.{field}={value}: expected a number > 0")
        if not 0 <= self.focal < math.inf:
            raise ValueError(f"{place}.focal={self.focal}: expected gamma >= 0")
        self._validate_classes(place)

    def _validate_classes(self, place: str) -> None:
        needed = {"sequence": 2, "tags": 2, "multilabel": 1}.get(self.kind, 0)
        if len(self.classes) < needed or (self.classes and not needed):
            wanted = f"at least {needed}" if needed else "none"
            raise ValueError(f"{place}.classes: kind {self.kind} has {wanted}, got "
                             f"{len(self.classes)}: {', '.join(self.classes)}")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"{place}.classes: expected names that differ, got {self.classes}")
        weights = self.class_weights
        if weights is None:
            return
        if self.balanced_loss:
            raise ValueError(f"{place}.class_weights={weights}: balanced_loss=True makes them: "
                             "leave one of the two out")
        if len(weights) != len(self.classes) or not all(0 <= each for each in weights):
            raise ValueError(f"{place}.class_weights: expected {len(self.classes)} numbers >= 0, "
                             f"one for each class, got {weights}")


@dataclasses.dataclass
class TaskConfig(Config):
    """Fine-tuning of an encoder; `batch_size` is in examples, over all devices.

    encoder: work directory that `batiste import` or `batiste train` made. train_data,
    validation_data: a .jsonl file of examples, or FILE.py:NAME, a function without arguments that
    gives them. max_length: tokens of an example; what is longer is cut. balanced: name of the
    "sequence" head of whose classes all are drawn equally often; None draws by frequency. dropout:
    of the encoder, and of what its heads read. dtype: of the computation. patience: evaluations
    without a better validation loss, None for all steps.
    """

    encoder: str | None = None
    train_data: str | None = None
    validation_data: str | None = None
    heads: tuple[HeadConfig, ...] = (HeadConfig(),)  # what is learned, all at once
    max_length: int = 128
    balanced: str | None = None
    dropout: float = 0.1
    dtype: str = "float32"
    seed: int = 0  # of the heads, dropout and the order of the examples
    num_steps: int = 300  # updates of the whole run
    batch_size: int = 16  # examples of a step, over all devices
    accumulation: int = 1  # parts of a batch that are computed one after another
    patience: int | None = None
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(beta2=0.999, weight_decay=0.01))
    schedule: ScheduleConfig = dataclasses.field(
        default_factory=lambda: ScheduleConfig("linear", 5e-5, warmup_steps=0.1, final_fraction=0.0))
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    @property
    def train(self) -> TrainConfig:
        """The same as the training room's loop, optimizer and checkpoints read it."""
        config = TrainConfig(
            self.seed, self.num_steps, self.batch_size, self.accumulation, self.optimizer,
            self.schedule, checkpoint=self.checkpoint, evaluation=self.evaluation,
            health=HealthConfig(every=None))
        config.stop.patience = self.patience
        return config

    @property
    def apart(self) -> bool:
        """Whether the two texts of an example are read apart, and not as one."""
        return any(head.kind == "similarity" for head in self.heads)

    def validate(self) -> None:
        """Raises ValueError, naming the field and a fix, for a task that cannot be."""
        check_types(self)
        if not self.heads:
            raise ValueError("heads: expected at least one HeadConfig, got none")
        for index, head in enumerate(self.heads):
            head.validate(f"heads[{index}]")
        names = [head.name for head in self.heads]
        if len(set(names)) != len(names):
            raise ValueError(f"heads: expected names that differ, got {', '.join(names)}")
        if self.balanced is not None:
            known = [head.name for head in self.heads if head.kind == "sequence"]
            check_choice("balanced", self.balanced, known or ["a head of kind sequence"])
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: expected 0 <= dropout < 1")
        if self.max_length < 4:
            raise ValueError(f"max_length={self.max_length}: expected at least 4 tokens")
        try:
            self.train.validate()
        except ValueError as error:
            raise ValueError(str(error).replace("train.", "")) from None
        self._validate_together()

    def _validate_together(self) -> None:
        kinds = {head.kind for head in self.heads}
        if {"similarity", "span"} <= kinds:
            raise ValueError("heads: 'similarity' reads two texts apart and 'span' as one: train "
                             "them as two tasks")
        if "similarity" in kinds and self.accumulation > 1:
            raise ValueError(
                f"accumulation={self.accumulation}: the loss of 'similarity' is over all examples "
                "of a batch together, which micro-batches are not: set accumulation=1")
        for axis in ("stage", "context"):
            if getattr(self.mesh, axis) > 1:
                raise ValueError(f"mesh.{axis}={getattr(self.mesh, axis)}: tasks are split over "
                                 f"data and tensor: set mesh.{axis}=1")
        if self.mesh.offload_optimizer:
            raise ValueError("mesh.offload_optimizer=True: tasks keep the optimizer's state on the "
                             "device: set it to False")

    def validate_on(self, num_devices: int) -> None:
        """Raises ValueError when the batch does not divide over these devices."""
        self.validate()
        rows = math.prod(
            size for axis, size in zip(
                ("slice", "data", "stage", "context", "expert", "tensor"),
                self.mesh.shape(num_devices), strict=True)
            if axis in ("slice", "data", "expert"))
        if self.batch_size // self.accumulation % rows:
            raise ValueError(
                f"batch_size={self.batch_size} / accumulation={self.accumulation} examples do not "
                f"divide over {rows} devices: make batch_size a multiple of "
                f"{rows * self.accumulation}")
