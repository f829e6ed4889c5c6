"""How many devices along which mesh axis, and what is sharded over `data`."""

import dataclasses
import math

AXES = ("slice", "data", "stage", "context", "expert", "tensor")
WORKING_AXES = ("slice", "data", "context", "expert", "tensor")
CONTEXT_EXCHANGES = ("ring", "all_to_all")


@dataclasses.dataclass
class MeshConfig:
    """Sizes of the mesh axes; `data=None` takes all devices that the other axes leave.

    `zero` says what is sharded over `data`: 0 nothing, 1 optimizer state, 2 and gradients,
    3 and parameters (Rajbhandari et al. 2020, arXiv:1910.02054). `offload_optimizer` keeps the
    optimizer's state in the host's memory between updates (Ren et al. 2021, arXiv:2101.06840).
    `context_exchange` says how the
    devices that share a row attend: keys and values pass from one to the next ("ring", Liu et al.
    2023, arXiv:2310.01889), or time is exchanged for heads ("all_to_all", Jacobs et al. 2023,
    arXiv:2309.14509).
    """

    slice: int = 1
    data: int | None = None
    stage: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1
    zero: int = 0
    offload_optimizer: bool = False
    context_exchange: str = "ring"

    def validate(self) -> None:
        """Raises ValueError for an impossible size, or an axis that does not work yet."""
        for axis in AXES:
            size = getattr(self, axis)
            if size is not None and size < 1:
                raise ValueError(f"mesh.{axis}={size}: expected a positive number of devices")
            if axis not in WORKING_AXES and size != 1:
                raise ValueError(
                    f"mesh.{axis}={size}: not yet; only {' and '.join(WORKING_AXES)} can exceed 1"
                )
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"mesh.zero={self.zero}: expected 0, 1, 2 or 3")
        if self.context_exchange not in CONTEXT_EXCHANGES:
            raise ValueError(
                f"mesh.context_exchange={self.context_exchange!r}: expected one of "
                f"{', '.join(CONTEXT_EXCHANGES)}"
            )

    def shape(self, num_devices: int) -> tuple[int, ...]:
        """Sizes of AXES for `num_devices`; ValueError if they do not multiply to it."""
        others = math.prod(getattr(self, axis) for axis in AXES if axis != "data")
        data = num_devices // others if self.data is None else self.data
        if data * others != num_devices:
            asked = " x ".join(f"{axis} {getattr(self, axis)}" for axis in WORKING_AXES)
            raise ValueError(
                f"mesh ({asked}) does not fit the {num_devices} devices here: leave mesh.data "
                f"unset and choose mesh.tensor among the divisors of {num_devices}"
            )
        return tuple(data if axis == "data" else getattr(self, axis) for axis in AXES)
