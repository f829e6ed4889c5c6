"""Parameters from the tensors of files and back, one tensor at a time."""

import functools
import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batiste.interop.family import Family
from batiste.interop.files import Planned, Tensors
from batiste.interop.layout import Row, Sizes, file_shape, letters_of, to_ours, to_theirs
from batiste.models import TransformerConfig

# What old files have besides weights: tables that follow from the config.
NO_WEIGHTS = re.compile(
    r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|embeddings\.position_ids$")
# Bytes of a tensor that are copied and converted at a time. Whole, a head of 168 MB took 273 MB of
# the host's memory besides its place; so it takes 171, of which 84 are the file's own pages.
MOST_AT_ONCE = 2**24
# Fewer names than this are made and looked up one after another, whatever the files have.
MOST_NAMES = 10_000
# Sinusoids, which follow from the config.
TABLES = "embed_positions.weight"
# As LayerNorms of the first BERTs have it.
OLD_ENDINGS = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}


def flat(tree: Any) -> dict[str, Any]:
    """A tree of parameters by path, "layers/attention/query_DNH"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


class WeightMap:
    """Which tensors hold which parameters of one model.

    abstract: its parameters (shapes suffice). Raises ValueError where the family has no tensor for
    a parameter. theirs: the config in the family's own words. aside: what an import found that no
    parameter has; it is written back as it was.
    """

    def __init__(
        self, family: Family, model: TransformerConfig, theirs: Mapping[str, Any], abstract: Any,
        aside: Mapping[str, np.ndarray] | None = None,
    ):
        self.model, self._theirs, self._family = model, theirs, family
        self._aside = {} if aside is None else dict(aside)
        self._shapes = {path: leaf.shape for path, leaf in flat(abstract).items()}
        self.rows = [row for row in family.rows
                     if row.ours[0] in self._shapes and row.gated in (None, model.gated)]
        missing = set(self._shapes) - {path for row in self.rows for path in row.ours}
        if missing:
            names = ", ".join(sorted(missing))
            raise ValueError(f"a {family.model_type} has no tensor for {names}")

    def names(self, row: Row) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name of each tensor of a row, and its place: layer and expert, where it has them."""
        places = self._places(row)
        for place in itertools.product(*places.values()):
            named = dict(zip(places, place, strict=True))
            if "layer" in named and not row.dense:
                named["layer"] += self.model.dense_layers
            yield row.theirs.format(**named), place

    def _places(self, row: Row) -> dict[str, range]:
        """The layers and experts of which a row has a tensor each."""
        dense = self.model.dense_layers
        layers = range(dense) if row.dense else range(self.model.num_layers - dense)
        layers = range(1) if self.model.shared_layers else layers
        layers = range(self.model.encoder_layers) if row.stack == "encoder_layers" else layers
        places = {"layer": layers, "expert": range(self.model.num_experts or 0)}
        return {axis: place for axis, place in places.items() if f"{{{axis}}}" in row.theirs}

    def sizes(self, row: Row) -> Sizes:
        """What the conversion of a row must know."""
        letters = {
            path: dict(zip(letters_of(path), self._shapes[path][-len(letters_of(path)):],
                           strict=True)) for path in row.ours
        }
        rotated = 0
        if row.rotary is not None:
            rotated = self.model.rope_dim or letters[row.ours[0]][row.rotary]
        scale = 1.0 if row.scaled_by is None else self._theirs[row.scaled_by]
        if np.frexp(scale)[0] != 0.5:
            raise ValueError(
                f"config.json: {row.scaled_by}={scale}: expected a power of two, by which weights "
                "can be multiplied and divided again without loss"
            )
        return Sizes(letters, rotated, scale)

    def planned(self, dtype: np.dtype) -> list[Planned]:
        """All tensors, in the order in which `tensors` gives them."""
        of_rows = [
            Planned(name, _dtype(row, dtype), self._shape(row))
            for row in self.rows for name, _ in self.names(row)
        ]
        return of_rows + [
            Planned(name, tensor.dtype, tensor.shape) for name, tensor in self._whole_aside()]

    def aside(self, tensors: Tensors) -> dict[str, np.ndarray]:
        """What of files no parameter has: tensors, and the first entries of others."""
        found = {name: tensors.read(name) for name, entry in sorted(tensors.entries.items())
                 if name.startswith(self._family.aside) and entry.dtype is not None}
        for row in self.rows:
            for name, _ in self.names(row) if row.skipped else ():
                found[name] = tensors.read(_name_in(tensors, name))[: row.skipped]
        return found

    def _whole_aside(self) -> list[tuple[str, np.ndarray]]:
        parts = {name for row in self.rows if row.skipped for name, _ in self.names(row)}
        return [each for each in self._aside.items() if each[0] not in parts]

    def _shape(self, row: Row) -> tuple[int, ...]:
        first, *others = file_shape(row, self.sizes(row))
        return (first + row.skipped, *others)

    def check(self, tensors: Tensors) -> None:
        """Raises ValueError where files have other tensors, shapes or dtypes than this model."""
        self._check_count(tensors)
        planned = {each.name: each for each in self.planned(np.dtype(np.float32))}
        names = {name: _name_in(tensors, name) for name in planned}
        for name, found in names.items():
            if found not in tensors.entries:
                raise ValueError(
                    f"the files have no tensor {name}, which their config.json implies")
        known = set(names.values()) | set(self._family.repeated)
        for name in sorted(tensors.entries.keys() - known):
            if NO_WEIGHTS.search(name) is None and not name.startswith(self._family.aside):
                raise ValueError(
                    f"the files have a tensor {name}, for which this model has no parameter"
                )
        for name in self._family.zeros:
            if name in tensors.entries and np.any(tensors.read(name)):
                raise ValueError(f"{name} is not 0 everywhere: this model has no parameter for it")
        for name, each in planned.items():
            entry = tensors.entries[names[name]]
            if entry.dtype is None:
                raise ValueError(f"{name} is quantized or no float: expected F32, BF16 or F16")
            if entry.shape != each.shape:
                raise ValueError(
                    f"{name} has shape {entry.shape}, but config.json says {each.shape}"
                )
        self._check_repeated(tensors, planned.keys())

    def _check_count(self, tensors: Tensors) -> None:
        """Raises ValueError where there are fewer tensors than names, before each name is made."""
        count = sum(math.prod(map(len, self._places(row).values())) for row in self.rows)
        if count > max(MOST_NAMES, 2 * len(tensors.entries)):
            raise ValueError(f"config.json implies {count:,} tensors, but the files have "
                             f"{len(tensors.entries):,}")

    def _check_repeated(self, tensors: Tensors, planned: Collection[str]) -> None:
        """Raises ValueError where what a file has twice differs, so that one would be lost."""
        for name in self._family.repeated:
            if name not in tensors.entries or name in planned or name.endswith(TABLES):
                continue
            wanted = "head_transform/bias_V" if name.endswith(".bias") else "embedding_V"
            rows = [row for row in self.rows if row.ours[0].startswith(wanted)]
            for first in (_name_in(tensors, row.theirs) for row in rows):
                if not _equal(tensors.read(name), tensors.read(first)):
                    raise ValueError(
                        f"{name} is not {first}, but config.json says that they are one "
                        "(tie_word_embeddings): write false there if the model has two")

    def parameters(self, tensors: Tensors, abstract: Any) -> Any:
        """The parameters, each on its devices as `abstract` says; one tensor at a time is read."""
        self.check(tensors)
        leaves, found = flat(abstract), {}
        for row in self.rows:
            sizes = self.sizes(row)
            placed = [_Placed(leaves[path]) for path in row.ours]
            for name, place in self.names(row):
                tensor = tensors.read(_name_in(tensors, name))[row.skipped:]
                parts = to_ours(row, tensor, sizes)
                for target, part in zip(placed, parts, strict=True):
                    target.put(part, place)
            found |= dict(zip(row.ours, (each.array() for each in placed), strict=True))
        structure = jax.tree.structure(abstract)
        return structure.unflatten(found[path] for path in leaves)

    def tensors(self, params: Any, dtype: np.dtype) -> Iterator[np.ndarray]:
        """The tensors of parameters, one after another, rounded to a dtype of files."""
        leaves = flat(params)
        for row in self.rows:
            sizes = self.sizes(row)
            for name, place in self.names(row):
                parts = [np.asarray(leaves[path][place] if place else leaves[path])
                         for path in row.ours]
                tensor = to_theirs(row, parts, sizes).astype(_dtype(row, dtype))
                yield self._with_skipped(row, name, tensor) if row.skipped else tensor
        for _, tensor in self._whole_aside():
            yield tensor

    def _with_skipped(self, row: Row, name: str, tensor: np.ndarray) -> np.ndarray:
        """With the entries that no parameter has: those that were there, or zeros."""
        zeros = np.zeros((row.skipped, *tensor.shape[1:]), tensor.dtype)
        return np.concatenate([self._aside.get(name, zeros).astype(tensor.dtype), tensor])


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether tensors are the same; of large ones a few rows at a time are read."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    rows = max(1, MOST_AT_ONCE * len(one) // max(1, one.nbytes))
    return all(np.array_equal(one[start:start + rows], other[start:start + rows])
               for start in range(0, len(one), rows))


def _dtype(row: Row, dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if row.always_float32 else dtype


def _name_in(tensors: Tensors, name: str) -> str:
    """A tensor's name in files: some are of a model without its head, and lack the first part."""
    body, _, rest = name.partition(".")
    names = [name] if body in ("lm_head", "cls", "shared", "encoder", "decoder") else [name, rest]
    for ending, old in OLD_ENDINGS.items():
        names += [each.removesuffix(ending) + old for each in names if each.endswith(ending)]
    return next((each for each in names if each in tensors.entries), name)


class _Placed:
    """One parameter in the making: on each device its share, filled piece by piece."""

    def __init__(self, leaf: jax.ShapeDtypeStruct):
        self._leaf = leaf
        indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
        self._slices = {
            device: [range(*each.indices(size)) for each, size in zip(index, leaf.shape)]
            for device, index in indices.items()
        }
        self._shares: dict[jax.Device, jax.Array] = {}

    def put(self, piece: np.ndarray, place: tuple[int, ...]) -> None:
        """Puts what belongs at a place (layer, expert; whole, if none) where it is wanted."""
        for device, ranges in self._slices.items():
            leading, rest = ranges[: len(place)], ranges[len(place):]
            if not all(index in here for index, here in zip(place, leading)):
                continue
            part = piece[tuple(slice(each.start, each.stop) for each in rest)]
            at = tuple(index - here.start for index, here in zip(place, leading))
            self._fill(device, part, at)

    def _fill(self, device: jax.Device, part: np.ndarray, at: tuple[int, ...]) -> None:
        """Puts a device's part there, a few of its rows at a time."""
        count = -(-part.nbytes // MOST_AT_ONCE)
        rows = max(1, -(-len(part) // max(1, count)))
        for start in range(0, len(part), rows):
            few = np.ascontiguousarray(part[start:start + rows])
            few = jax.device_put(few, device).astype(self._leaf.dtype)
            if few.shape != self._share_shape(device):
                few = few.reshape((1,) * len(at) + few.shape)
                places = (*at, start, *(0,) * (few.ndim - len(at) - 1))
                few = _filled(self._share(device), few, places)
            # One after another: what is still being copied would pile up in the host's memory.
            self._shares[device] = jax.block_until_ready(few)

    def array(self) -> jax.Array:
        """The whole."""
        return jax.make_array_from_single_device_arrays(
            self._leaf.shape, self._leaf.sharding, list(self._shares.values()))

    def _share_shape(self, device: jax.Device) -> tuple[int, ...]:
        return tuple(len(each) for each in self._slices[device])

    def _share(self, device: jax.Device) -> jax.Array:
        if device not in self._shares:
            shape = self._share_shape(device)
            self._shares[device] = jnp.zeros(shape, self._leaf.dtype, device=device)
        return self._shares[device]


@functools.partial(jax.jit, donate_argnums=0)
def _filled(share: jax.Array, piece: jax.Array, at: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(share, piece, at)
