"""How many devices along which mesh axis, and what is sharded over `data`."""

import dataclasses
import math

from batiste.fields import Config, check_types

AXES = ("slice", "data", "stage", "context", "expert", "tensor")
CONTEXT_EXCHANGES = ("ring", "all_to_all")


@dataclasses.dataclass
class MeshConfig(Config):
    """Sizes of the mesh axes; `data=None` takes all devices that the other axes leave.

    `slice` counts TPU slices, or groups of devices with a slow network between them; what ZeRO
    splits over `data` every slice has once.
    `zero` says what is sharded over `data`: 0 nothing, 1 optimizer state, 2 and gradients,
    3 and parameters (Rajbhandari et al. 2020, arXiv:1910.02054). `offload_optimizer` keeps the
    optimizer's state in the host's memory between updates (Ren et al. 2021, arXiv:2101.06840).
    `context_exchange` says how the devices that share a row attend: keys and values pass from one
    to the next ("ring", Liu et al. 2023, arXiv:2310.01889), or time is exchanged for heads
    ("all_to_all", Jacobs et al. 2023, arXiv:2309.14509).
    `micro_batches` of the rows of one accumulation step flow through the stages one after another
    (GPipe, Huang et al. 2019, arXiv:1811.06965). Each passes every stage `interleave` times, each
    time through fewer layers, so that stages wait less (Narayanan et al. 2021, arXiv:2104.04473).
    """

    slice: int = 1  # TPU slices, or groups of devices with a slow network between them
    data: int | None = None  # parts of the batch; None: all devices that the other axes leave
    stage: int = 1  # stages of a pipeline, each with a part of the layers
    context: int = 1  # parts of each row of tokens
    expert: int = 1  # parts of the experts of a mixture
    tensor: int = 1  # parts of heads, feed-forward units and vocabulary
    # what is sharded over `data`: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters
    zero: int = 0
    offload_optimizer: bool = False  # the optimizer's state is in the host's memory between updates
    context_exchange: str = "ring"  # how devices along `context` attend: ring or all_to_all
    micro_batches: int = 1  # parts of the batch that flow through the stages one after another
    interleave: int = 1  # times that each part passes every stage

    def validate(self) -> None:
        """Raises ValueError for an impossible size or choice."""
        check_types(self, "mesh.")
        for axis in AXES:
            size = getattr(self, axis)
            if size is not None and size < 1:
                raise ValueError(f"mesh.{axis}={size}: expected a positive number of devices")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"mesh.zero={self.zero}: expected 0, 1, 2 or 3")
        if self.context_exchange not in CONTEXT_EXCHANGES:
            raise ValueError(
                f"mesh.context_exchange={self.context_exchange!r}: expected one of "
                f"{', '.join(CONTEXT_EXCHANGES)}"
            )
        self._validate_pipeline()

    def _validate_pipeline(self) -> None:
        for field in ("micro_batches", "interleave"):
            value = getattr(self, field)
            if value < 1:
                raise ValueError(f"mesh.{field}={value}: expected at least 1")
            if value > 1 and self.stage == 1:
                raise ValueError(
                    f"mesh.{field}={value} has no effect on one stage: set it to 1, or raise "
                    "mesh.stage"
                )
        if self.interleave > 1 and self.micro_batches % self.stage:
            raise ValueError(
                f"mesh.micro_batches={self.micro_batches} is not a multiple of mesh.stage="
                f"{self.stage}, as mesh.interleave={self.interleave} needs: choose "
                f"{-(-self.micro_batches // self.stage) * self.stage}, or set mesh.interleave=1"
            )

    def shape(self, num_devices: int) -> tuple[int, ...]:
        """Sizes of AXES for `num_devices`; ValueError if they do not multiply to it."""
        others = math.prod(getattr(self, axis) for axis in AXES if axis != "data")
        data = num_devices // others if self.data is None else self.data
        if data * others != num_devices:
            sizes = {axis: getattr(self, axis) for axis in AXES}
            asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size not in (1, None))
            raise ValueError(
                f"mesh ({asked}) does not fit the {num_devices} devices here: leave mesh.data "
                f"unset and let the other axes multiply to a divisor of {num_devices}"
            )
        return tuple(data if axis == "data" else getattr(self, axis) for axis in AXES)

    def plain(self, num_devices: int) -> "MeshConfig":
        """What decodes: the same devices without slices, stages, context and experts.

        All but `tensor` becomes `data`, which then splits the parameters too, so that no device
        holds more of them than before. A mesh without those axes stays as it is.
        """
        if self.slice * self.stage * self.context * self.expert == 1:
            return self
        return MeshConfig(data=num_devices // self.tensor, tensor=self.tensor, zero=3)
