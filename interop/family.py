"""A family: how another library describes a model that ours can be, both ways."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from batiste.interop import rope
from batiste.interop.layout import Row
from batiste.models import TransformerConfig

REQUIRED = object()
# How a model is trained or computed: no file of weights says it.
FREE_FIELDS = (
    "attention", "remat", "saved", "offloaded", "scan_unroll", "dropout", "init_stddev",
    "depth_scaled_init", "dtype",
)
KINDS = {"full_attention": "global", "sliding_attention": "local"}


class Field(NamedTuple):
    """A key of their config that is a field of ours.

    theirs: None where the family leaves no choice, and `absent` says what it is. absent: the value
    of a key that is left out, or a function of their config. read, write: between the two values.
    """

    theirs: str | None
    ours: str
    absent: Any = REQUIRED
    read: Callable = lambda value: value
    write: Callable = lambda value: value


@dataclasses.dataclass(frozen=True)
class Family:
    """What one `model_type` says of a model, as data.

    architecture: the class that `transformers` makes of it. fixed: our fields that all members
    share. fields: the others. required: keys of theirs with the value that they must have, if they
    are there; they are written. kinds: the kind of each layer, for a config without `layer_types`.
    switch: the key that must be true for a window to count.
    extra: keys that are written where an import has not brought them along. also: keys that are
    written and follow from several of our fields. repeated: tensors that files may have twice.
    aside: beginnings of names that our model has no parameters for; they are kept as they came.
    zeros: of those, tensors that our model lacks without loss, as all of their values are 0.
    """

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    fields: tuple[Field, ...]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    required: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kinds: Callable[[Mapping], Sequence[str]] | None = None
    has_layer_types: bool = False
    switch: str | None = None
    rope_base: float | None = None
    local_rope_base: float | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    repeated: tuple[str, ...] = ("lm_head.weight",)
    aside: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    also: Callable[[TransformerConfig], Mapping[str, Any]] = lambda model: {}

    def model_of(self, theirs: Mapping[str, Any]) -> TransformerConfig:
        """The config of a model that `theirs` describes; ValueError for what ours cannot be."""
        for key, value in self.required.items():
            if theirs.get(key, value) != value:
                raise ValueError(
                    f"config.json: {key}={theirs[key]!r}, but of {self.model_type} only "
                    f"{key}={value!r} is known here"
                )
        values: dict[str, Any] = dict(self.fixed)
        for field in self.fields:
            values[field.ours] = self._read(field, theirs)
        if self.rope_base is not None:
            values |= rope.read(theirs, self.rope_base, self.local_rope_base)
        values |= self._pattern(theirs)
        dtype = theirs.get("dtype", theirs.get("torch_dtype")) or "float32"
        model = TransformerConfig(dtype=dtype, **values)
        model.validate()
        return model

    def config_of(self, model: TransformerConfig, brought: Mapping[str, Any]) -> dict[str, Any]:
        """Their config of a model; ValueError, with the fields, if the family has no such model.

        brought: the config that an import brought along, for keys that are not ours.
        """
        theirs, differences = self._compared(model, brought)
        if differences:
            raise ValueError(
                f"a {self.model_type} has no place for {', '.join(differences)}: export another "
                "family, or train a model that is one"
            )
        return theirs

    def differences(self, model: TransformerConfig) -> list[str]:
        """The fields in which a model is none of this family, each beside what the family has.

        Raises ValueError where the family has nothing comparable to it.
        """
        return self._compared(model, {})[1]

    def _compared(
        self, model: TransformerConfig, brought: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """The config of the family's model that is most like it, and where the two differ."""
        theirs = self._write(model, brought)
        return theirs, _different(model, self.model_of(theirs))

    def _write(self, model: TransformerConfig, brought: Mapping[str, Any]) -> dict[str, Any]:
        theirs = dict(self.extra) | dict(brought) | dict(self.required)
        theirs |= {"model_type": self.model_type, "architectures": [self.architecture],
                   "dtype": model.dtype}
        theirs.pop("torch_dtype", None)
        for field in self.fields:
            # What was brought stays where it says the same: one thing may have several names.
            if field.theirs is not None:
                value, given = getattr(model, field.ours), brought.get(field.theirs)
                same = given is not None and field.read(given) == value
                theirs[field.theirs] = given if same else field.write(value)
        theirs |= self.also(model)
        if self.rope_base is not None:
            theirs |= rope.write(model, self.local_rope_base is not None)
        if self.kinds is not None:
            theirs["sliding_window"] = model.window
        if self.switch is not None:
            theirs[self.switch] = model.window is not None
        if self.has_layer_types:
            names = {ours: name for name, ours in KINDS.items()}
            theirs["layer_types"] = [names[kind] for kind in model.layer_kinds]
        return theirs

    def _read(self, field: Field, theirs: Mapping[str, Any]) -> Any:
        if field.theirs is not None and theirs.get(field.theirs) is not None:
            return field.read(theirs[field.theirs])
        if field.absent is REQUIRED:
            raise ValueError(f"config.json: {field.theirs} is missing; a {self.model_type} has one")
        return field.absent(theirs) if callable(field.absent) else field.absent

    def _pattern(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """The shortest pattern that gives the kind of each layer, and the window."""
        if self.kinds is None:
            return {}
        given = theirs.get("layer_types") if self.has_layer_types else None
        kinds = self.kinds(theirs) if given is None else [KINDS.get(name, name) for name in given]
        period = next(
            size for size in range(1, len(kinds) + 1)
            if all(kind == kinds[layer % size] for layer, kind in enumerate(kinds))
        )
        window = theirs.get("sliding_window") if "local" in kinds else None
        return {"layer_pattern": tuple(kinds[:period]), "window": window}


def family_of(theirs: Mapping[str, Any], families: Sequence[Family]) -> Family:
    """The family of a config.json; ValueError names those that are known."""
    given = theirs.get("model_type")
    for family in families:
        if family.model_type == given:
            return family
    known = ", ".join(family.model_type for family in families)
    raise ValueError(f"config.json: model_type={given!r}: expected one of {known}")


def fitting_family(model: TransformerConfig, families: Sequence[Family]) -> Family:
    """The first family that has a model like this.

    Raises ValueError naming the family that differs in the fewest fields, and these fields.
    """
    nearest: tuple[Family, list[str]] | None = None
    for family in families:
        try:
            differences = family.differences(model)
        except ValueError:  # Not even a config of that family can be written of this model.
            continue
        if not differences:
            return family
        if nearest is None or len(differences) < len(nearest[1]):
            nearest = family, differences
    if nearest is None:
        raise ValueError(
            "no family has a model like this one: --format=stablehlo writes a decoder's program")
    raise ValueError(
        f"no family has this model; the nearest is {nearest[0].model_type}, which has no place for "
        f"{', '.join(nearest[1])}: train a model that is one, or write a decoder's program with "
        "--format=stablehlo"
    )


def _different(one: TransformerConfig, other: TransformerConfig) -> list[str]:
    one, other = _plain(one), _plain(other)
    return [
        f"model.{field.name}={getattr(one, field.name)!r} (its own is {getattr(other, field.name)!r})"
        for field in dataclasses.fields(one)
        if field.name not in FREE_FIELDS and getattr(one, field.name) != getattr(other, field.name)
    ]


def _plain(model: TransformerConfig) -> TransformerConfig:
    """The same with fields that have no effect at their defaults, and defaults spelled out."""
    inert = []
    if model.positions != "rope":
        inert += ["rope_base", "rope_scaling"]
    if model.positions != "rope" or model.rope_scaling is None:
        inert += ["rope_factor"]
    if model.positions != "rope" or model.rope_scaling not in ("llama3", "yarn"):
        inert += ["rope_original_length"]
    if model.local_rope_base == model.rope_base and model.rope_scaling is None:
        inert += ["local_rope_base"]
    if model.num_experts is None:
        inert += ["experts_per_token"]
    defaults = TransformerConfig()
    scale = model.attention_scale
    return dataclasses.replace(
        model, **{name: getattr(defaults, name) for name in inert},
        layer_pattern=model.layer_kinds,
        attention_scale=model.head_dim**-0.5 if scale is None else scale,
    )


def from_square(value: float) -> float:
    """The scale of which a config has the inverse square."""
    return value**-0.5


def to_square(value: float | None) -> float | None:
    """The inverse square, whole where it is whole but for rounding."""
    if value is None:
        return None
    square = value**-2
    return round(square) if math.isclose(square, round(square), rel_tol=1e-9) else square
