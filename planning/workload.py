"""What is planned: a model, how it is trained, and the machine that it is to run on."""

import dataclasses
import math
from typing import NamedTuple

from batiste.models import TransformerConfig
from batiste.sharding import AXES, MeshConfig
from batiste.sharding.devices import DEVICES, Device
from batiste.train import TrainConfig


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, its training and the tokens of a row: what does not depend on the machine."""

    model: TransformerConfig
    train: TrainConfig
    length: int

    def chosen(self, choice: "Choice") -> "Workload":
        """The workload with the choice written into its configs."""
        return dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, **choice.policy._asdict()),
            train=dataclasses.replace(self.train, accumulation=choice.accumulation),
        )

    @property
    def arrays(self) -> tuple[str, ...]:
        """The arrays of a Batch that the model reads; a source is taken to be as long as a row."""
        sources = ("source_tokens_BS", "source_segments_BS", "source_positions_BS")
        rows = ("tokens_BT", "targets_BT", "weights_BT", "segments_BT", "positions_BT")
        return rows + sources if self.model.form == "encoder_decoder" else rows

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.train.batch_size * self.length


class Measured(NamedTuple):
    """Seconds of a token of training steps measured here, the update's share included.

    layer, rest: of a token in one layer, forward and backward, and in all that is not layers.
    """

    layer: float
    rest: float


class Machine(NamedTuple):
    """Devices of one kind. topology: the torus as given ("4x4x4"), () where links have none.

    measured: None where time is computed from the table of devices.
    """

    device: Device
    num_devices: int
    topology: tuple[int, ...] = ()
    measured: Measured | None = None

    @property
    def chips(self) -> int:
        """What is rented."""
        return self.num_devices // self.device.devices_per_chip

    def __str__(self) -> str:
        chips = f"{self.chips:,} x {self.device.name}"
        shape = "x".join(map(str, self.topology))
        return f"{chips} ({shape})" if shape else chips


class Policy(NamedTuple):
    """Fields of `TransformerConfig` that say what the forward pass keeps."""

    remat: str
    saved: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()


class Choice(NamedTuple):
    """What the planner chooses: sizes of the mesh, ZeRO, rematerialization, accumulation.

    saved, offloaded: the tensors that remat "names" keeps, on the device and on the host.
    """

    mesh: MeshConfig
    remat: str
    accumulation: int
    saved: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()

    @property
    def policy(self) -> "Policy":
        """The fields of the model that say what is kept."""
        return Policy(self.remat, self.saved, self.offloaded)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of all mesh axes; `mesh.data` must be set."""
        return {axis: getattr(self.mesh, axis) for axis in AXES}

    @property
    def ticks(self) -> int:
        """Chunks of layers that a stage works on, and waits for, in an accumulation step."""
        return self.mesh.micro_batches * self.mesh.interleave + self.mesh.stage - 1

    @property
    def batch_parts(self) -> int:
        """How many devices (along axes that split it) share the rows of a micro-batch."""
        return self.mesh.slice * self.mesh.data * self.mesh.expert


def tpu_machine(topology: str) -> Machine:
    """The machine of a TPU topology such as "v5p:4x4x4"; ValueError for what is none."""
    name, _, shape = topology.partition(":")
    tpus = {entry.name: entry for entry in DEVICES if entry.torus_dims}
    dims = shape.split("x")
    if name not in tpus or not all(dim.isdigit() and int(dim) > 0 for dim in dims):
        raise ValueError(
            f"--topology={topology}: expected NAME:SHAPE such as v5p:4x4x4, NAME one of "
            f"{', '.join(tpus)}"
        )
    device, sizes = tpus[name], tuple(map(int, dims))
    if len(sizes) != device.torus_dims:
        example = "x".join(["4"] * device.torus_dims)
        raise ValueError(
            f"--topology={topology}: {name} has {device.torus_dims} dims, got {len(sizes)}; write "
            f"for instance {name}:{example}"
        )
    num_devices = math.prod(sizes) * device.devices_per_chip
    if num_devices > device.neighbours:
        raise ValueError(
            f"--topology={topology}: {num_devices // device.devices_per_chip:,} chips, but a pod "
            f"of {name} has {device.neighbours // device.devices_per_chip:,}"
        )
    return Machine(device, num_devices, sizes)


def gpu_machine(gpu: str) -> Machine:
    """The machine of "h200:8"; ValueError for what is none."""
    name, _, count = gpu.partition(":")
    gpus = {entry.name: entry for entry in DEVICES if not entry.torus_dims}
    if name not in gpus or not count.isdigit() or int(count) < 1:
        raise ValueError(
            f"--gpu={gpu}: expected NAME:COUNT such as h200:8, NAME one of {', '.join(gpus)}"
        )
    return Machine(gpus[name], int(count))
