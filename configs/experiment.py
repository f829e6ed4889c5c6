"""One experiment: what each room needs, side by side; only main.py sees it whole."""

import dataclasses
import math
import reprlib
import types
import typing
from typing import Any

from batiste.configs.objective_checks import check_objectives
from batiste.configs.own_parts import load_own_parts
from batiste.data import DataConfig, special_tokens
from batiste.fields import Config, alternatives, check_types, types_of
from batiste.inference import SamplingConfig
from batiste.models import TransformerConfig
from batiste.sharding import AXES, MeshConfig, layer_order
from batiste.train import TrainConfig, parse_fault


@dataclasses.dataclass
class Experiment(Config):
    """A whole run; every field is a flag: --config.model.num_layers=8."""

    model: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    sample: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)

    def validate(self) -> None:
        """Raises ValueError, naming the field and a fix, for an experiment that cannot run."""
        check_types(self)
        load_own_parts(self)
        for room in (self.model, self.data, self.mesh, self.train, self.sample):
            room.validate()
        if self.data.sequence_length > self.model.max_length:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} exceeds model.max_length="
                f"{self.model.max_length}: raise model.max_length"
            )
        fault, depth = parse_fault(self.train.faults), self.model.num_layers
        if fault is not None and fault.layer is not None and not 0 <= fault.layer < depth:
            raise ValueError(
                f"train.faults={self.train.faults!r}: expected a layer from 0 to {depth - 1}, as "
                f"model.num_layers={depth}"
            )
        check_objectives(self.model, self.data, self.mesh, self.train)
        learned = self.data.tokenizer in ("bpe", "unigram")
        special = len(special_tokens(self.data))
        if learned and self.data.vocab_size + special > self.model.vocab_size:
            more = f", and {special} special ones of data.objectives" if special else ""
            raise ValueError(
                f"model.vocab_size={self.model.vocab_size} is below data.vocab_size="
                f"{self.data.vocab_size}, the tokens to be learned{more}: raise model.vocab_size"
            )
        for axis in ("stage", "tensor"):
            if self.train.objective.fused and getattr(self.mesh, axis) > 1:
                raise ValueError(
                    f"train.objective.fused=True does not know a vocabulary split over mesh.{axis}="
                    f"{getattr(self.mesh, axis)}: set mesh.{axis}=1, or train.objective.loss_chunk "
                    "instead"
                )
        self._validate_experts()
        if self.train.local.steps is not None and self.mesh.slice == 1:
            raise ValueError(
                f"train.local.steps={self.train.local.steps} are steps that slices take alone, but "
                "mesh.slice=1: set mesh.slice, or train.local.steps=None"
            )
        self._validate_splits()
        self._validate_dense_layers()
        layer_order(self.model.num_layers, self.mesh.stage, self.mesh.interleave)

    def _validate_experts(self) -> None:
        if self.model.num_experts is not None:
            return
        if self.mesh.expert > 1:
            raise ValueError(
                f"mesh.expert={self.mesh.expert} has no experts to split: set model.num_experts, "
                "or use mesh.data, which splits the batch just so"
            )
        for field in ("balance_loss", "router_z_loss"):
            if getattr(self.train.objective, field):
                raise ValueError(
                    f"train.objective.{field}={getattr(self.train.objective, field)} has no effect "
                    "without experts: set it to 0, or set model.num_experts"
                )

    def _validate_dense_layers(self) -> None:
        """Raises ValueError for what counts on all layers being alike."""
        if not self.model.dense_layers:
            return
        for field, given, instead in (
            ("mesh.stage", self.mesh.stage, 1), ("train.health.every", self.train.health.every, None),
        ):
            if given != instead:
                raise ValueError(
                    f"{field}={given} does not know layers of two sizes (model.dense_layers="
                    f"{self.model.dense_layers}): set {field}={instead}"
                )

    def _validate_splits(self) -> None:
        mesh, model = self.mesh, self.model
        exchanged = ("context",) if mesh.context_exchange == "all_to_all" else ()
        for field, size, axes in (
            ("model.num_heads", model.num_heads, ("tensor", *exchanged)),
            ("model.num_kv_heads", model.num_kv_heads, ("tensor",)),
            ("model.mlp_dim", model.mlp_dim, ("tensor",)),
            *self._generator_splits(),
            ("model.num_experts", model.num_experts or 0, ("expert",)),
            ("model.vocab_size", model.vocab_size, ("stage", "tensor")),
            ("data.sequence_length", self.data.sequence_length, ("context", "tensor")),
            ("train.objective.loss_chunk", self.train.objective.loss_chunk or 0,
             ("context", "tensor")),
        ):
            axes = [axis for axis in axes if getattr(mesh, axis) > 1]
            parts = math.prod(getattr(mesh, axis) for axis in axes)
            if size % parts:
                given = " * ".join(f"mesh.{axis}={getattr(mesh, axis)}" for axis in axes)
                raise ValueError(
                    f"{field}={size} is not divisible by {given}: choose sizes that divide it"
                )
        if mesh.context > 1 and mesh.context_exchange == "ring":
            self._validate_ring()

    def _generator_splits(self) -> list[tuple]:
        """What `tensor` splits of a generator, by the field that decides it."""
        if self.model.generator_heads is None:
            return []
        small, by = self.model.generator, f" (model.generator_heads={self.model.generator_heads})"
        return [(f"the generator's {field}{by}", getattr(small, field), ("tensor",))
                for field in ("num_heads", "num_kv_heads", "mlp_dim")]

    def _validate_ring(self) -> None:
        """Raises ValueError for what a ring cannot do, and the other exchange can."""
        parts, otherwise = 2 * self.mesh.context, "or mesh.context_exchange='all_to_all'"
        if self.data.sequence_length % parts:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} is not divisible by 2 * "
                f"mesh.context={parts}, the chunks of a ring: choose a multiple of {parts}, "
                f"{otherwise}"
            )
        if self.model.dropout > 0:
            raise ValueError(
                f"model.dropout={self.model.dropout} goes by places in whole rows, which "
                f"mesh.context_exchange='ring' does not have: set it to 0, {otherwise}"
            )

    def validate_on(self, num_devices: int) -> None:
        """Raises ValueError when mesh, batch and model do not fit together on these devices."""
        self.validate()
        sizes = dict(zip(AXES, self.mesh.shape(num_devices), strict=True))
        rows = sizes["slice"] * sizes["data"] * sizes["expert"] * self.mesh.micro_batches
        micro_batch = self.train.batch_size // self.train.accumulation
        if micro_batch % rows:
            given = " * ".join(
                f"mesh.{name}={size}" for name, size in (
                    *((axis, sizes[axis]) for axis in ("slice", "data", "expert")),
                    ("micro_batches", self.mesh.micro_batches),
                ) if name == "data" or size > 1
            )
            raise ValueError(
                f"train.batch_size={self.train.batch_size} / train.accumulation="
                f"{self.train.accumulation} = {micro_batch} sequences do not divide over {given}: "
                f"make train.batch_size a multiple of {rows * self.train.accumulation}"
            )
        splits = self.mesh.zero or self.mesh.slice > 1
        if splits and self.model.model_dim % sizes["data"]:
            by = f"mesh.zero={self.mesh.zero} splits it" if self.mesh.zero else (
                f"gradients are split before mesh.slice={self.mesh.slice} slices exchange them")
            raise ValueError(
                f"model.model_dim={self.model.model_dim} is not divisible by mesh.data="
                f"{sizes['data']}, over which {by}: choose sizes that divide it"
            )
        if self.model.generator_heads is not None and splits and (
                self.model.generator.model_dim % sizes["data"]):
            raise ValueError(
                f"model.generator_heads={self.model.generator_heads} makes a generator of model_dim "
                f"{self.model.generator.model_dim}, which mesh.data={sizes['data']} does not divide, "
                f"over which mesh.zero={self.mesh.zero} splits it: choose sizes that divide it"
            )
        plain = self.mesh.plain(num_devices)
        if plain is not self.mesh and self.model.model_dim % plain.data:
            raise ValueError(
                f"model.model_dim={self.model.model_dim} is not divisible by {plain.data}, the "
                "devices without mesh.tensor, over which the parameters are split to write samples: "
                f"choose model.model_dim a multiple of {plain.data}"
            )


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field under its dotted name, {"model.num_layers": 6, ...}; tuples become lists."""
    flat = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, name + ".")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for index, item in enumerate(value):
                flat |= flatten(item, f"{name}[{index}].")
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def from_dict(kind: type, values: Any) -> Any:
    """Rebuilds a config from `dataclasses.asdict` after a trip through JSON.

    Raises ValueError naming the fields that this version of the config does not have, and those
    whose value is of another type.
    """
    config = _from_json(kind, values, "")
    check_types(config)
    return config


def _from_json(hint: Any, value: Any, name: str) -> Any:
    """The value of a field of a declared type; what is neither tuple nor config stays as it is."""
    (kind, *_) = (each for each in alternatives(hint) if each is not types.NoneType)
    if value is None:
        return None
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name}={reprlib.repr(value)}: expected a list")
        (item, *_) = typing.get_args(kind)
        return tuple(_from_json(item, each, f"{name}[{index}]")
                     for index, each in enumerate(value))
    if not dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            raise ValueError(f"{name}: expected one value and not fields {', '.join(value)}: the "
                             "stored config is of another version of batiste")
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{name or 'the config'}={reprlib.repr(value)}: expected the fields of a "
                         f"{kind.__name__}")
    hints = types_of(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}: the stored config is "
                         "of another version of batiste")
    start = f"{name}." if name else ""
    return kind(**{field: _from_json(hints[field], each, start + field)
                   for field, each in value.items()})
