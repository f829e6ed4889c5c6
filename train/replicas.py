"""Whether devices that hold the same part of the training state hold the same bits.

Data-parallel replicas are never compared by the training itself: a bit that flips in one of them
stays there, and its gradients reach all others. So each device adds up the bits of what it holds,
array by array, and only these sums leave it. Devices with the same part of an array, by its
sharding, must have the same sum; what ZeRO or `tensor` splits has no replica and is not compared.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from batiste.sharding import HOST_MEMORY, together
from batiste.train.health import HealthConfig, replica_policy

WORDS = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}
NAMED_AT_MOST = 3


class Difference(NamedTuple):
    """One array of which devices hold different bits; numbers are places in `mesh.devices.flat`.

    wrong: those that most others with the same part differ from, () where no majority says so;
    among: all that hold the part.
    """

    parameter: str
    wrong: tuple[int, ...]
    among: tuple[int, ...]


class Replicas:
    """Compares the replicas of a state, every `train.health.replicas_every` steps and when asked.

    All processes of a run make the same calls, in the same order. report: is called with the name
    and the fields of what was found. latest: the newest checkpoint's step, which is a good one.
    """

    def __init__(
        self, config: HealthConfig, mesh: jax.sharding.Mesh, abstract_state: Any,
        report: Callable[..., None] = lambda event, **fields: None,
        latest: Callable[[], int | None] = lambda: None,
    ):
        self._every, self._repairs = config.replicas_every, replica_policy(config.policies) == "repair"
        self._mesh, self._report, self._latest = mesh, report, latest
        self._abstract, self._looked = jax.tree.leaves(abstract_state), -1
        paths = jax.tree_util.tree_leaves_with_path(abstract_state)
        self._names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
        self._groups = [_replicas(mesh, leaf) for _, leaf in paths]
        self._sums = jax.jit(functools.partial(_sums, mesh, abstract_state))

    def due(self, step: int) -> bool:
        """Whether the replicas are compared after this step."""
        return step % self._every == 0

    def check(self, step: int, state: Any) -> Any:
        """The state; what the majority has, where another state was found and is to be repaired.

        Raises ValueError where replicas differ and cannot be, or are not to be, repaired.
        """
        if self._looked == step:
            return state
        self._looked = step
        found = self._compare(state)
        if not found:
            return state
        said = "; ".join(map(self._say, found[:NAMED_AT_MOST]))
        more = f"; and {len(found) - NAMED_AT_MOST} more" if len(found) > NAMED_AT_MOST else ""
        known = all(each.wrong for each in found)
        action = "repair" if self._repairs and known else "stop"
        self._report("replicas_differ", step=step, action=action, what=said + more)
        if action == "repair":
            return self._repaired(state, found)
        why = ", and no majority to repair them from" if self._repairs else ""
        latest = self._latest()
        last = "none was saved" if latest is None else f"the newest is of step {latest}"
        raise ValueError(
            f"replicas of the training state differ after step {step}{why}: {said}{more}. This "
            f"state is not saved; what was saved before was compared and is good ({last}). Look at "
            "that device, and the same command continues; train.health.policies="
            "replicas_differ=repair goes on with what most replicas have"
        )

    def _compare(self, state: Any) -> list[Difference]:
        """The arrays whose replicas differ; the same in all processes."""
        sums = self._sums(state)
        number = {device: place for place, device in enumerate(self._mesh.devices.flat)}
        mine = {number[shard.device]: shard.data for shard in sums.addressable_shards}
        rows = {place: row.reshape(-1).tolist() for place, row in jax.device_get(mine).items()}
        shared: dict[int, list[int]] = {}
        for text in together("compare replicas of the state", lambda: json.dumps(rows)):
            shared |= {int(place): row for place, row in json.loads(text).items()}
        found = []
        for index, (name, groups) in enumerate(zip(self._names, self._groups, strict=True)):
            for group in groups:
                values = {place: shared[place][index] for place in group}
                if len(set(values.values())) > 1:
                    found.append(Difference(name, _wrong(values), group))
        return found

    def _say(self, found: Difference) -> str:
        flat = list(self._mesh.devices.flat)

        def named(places: tuple[int, ...]) -> str:
            return ", ".join(f"device {flat[place].id} (process {flat[place].process_index})"
                             for place in places)

        if found.wrong:
            return (f"{found.parameter} on {named(found.wrong)}, unlike most of its "
                    f"{len(found.among)} replicas")
        return f"{found.parameter} between {named(found.among)}"

    def _repaired(self, state: Any, found: list[Difference]) -> Any:
        """The state with what differs copied from a device that is right."""
        leaves, structure = jax.tree.flatten(state)
        for index, name in enumerate(self._names):
            wrong = {place for each in found if each.parameter == name for place in each.wrong}
            if not wrong:
                continue
            sources = [next(place for place in group if place not in wrong)
                       for group in self._groups[index]]
            leaves[index] = _copied(self._mesh, self._abstract[index], leaves[index], sources)
        return jax.tree.unflatten(structure, leaves)


def _replicas(mesh: jax.sharding.Mesh, leaf: Any) -> list[tuple[int, ...]]:
    """The devices that hold each part of an array, where they are several."""
    number = {device: place for place, device in enumerate(mesh.devices.flat)}
    groups: dict[str, list[int]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        groups.setdefault(repr(index), []).append(number[device])
    return [tuple(sorted(group)) for group in groups.values() if len(group) > 1]


def _wrong(values: dict[int, int]) -> tuple[int, ...]:
    """Those that differ from more than half of all."""
    value, count = Counter(values.values()).most_common(1)[0]
    if 2 * count <= len(values):
        return ()
    return tuple(place for place, each in values.items() if each != value)


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as unsigned integers of its item size."""
    return jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize])


def _sums(mesh: jax.sharding.Mesh, abstract: Any, state: Any) -> jax.Array:
    """The sum of the words of each array that each device holds, uint32 [devices, arrays]."""
    specs = tuple(leaf.sharding.spec for leaf in jax.tree.leaves(abstract))

    def of_this_device(*parts: jax.Array) -> jax.Array:
        return jnp.stack([_words(part).astype(jnp.uint32).sum() for part in parts])[None]

    return jax.shard_map(
        of_this_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(mesh.axis_names),
        check_vma=False,
    )(*map(_on_device, jax.tree.leaves(state), jax.tree.leaves(abstract)))


def _copied(mesh: jax.sharding.Mesh, like: Any, leaf: jax.Array, sources: list[int]) -> jax.Array:
    """The array with each part as one of the `sources` has it, bit for bit.

    A sum over the replicas of which all but one are 0, so that it works between processes too.
    """
    own = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    is_source = np.zeros(mesh.size, np.uint32)
    is_source[sources] = 1
    named = ((axes,) if isinstance(axes, str) else axes or () for axes in like.sharding.spec)
    splits = {axis for axes in named for axis in axes}
    replicated = tuple(axis for axis in mesh.axis_names if axis not in splits)

    def of_this_device(part: jax.Array, good: jax.Array) -> jax.Array:
        words = _words(part)
        summed = jax.lax.psum(words.astype(jnp.uint32) * good[0], replicated)
        return jax.lax.bitcast_convert_type(summed.astype(words.dtype), part.dtype)

    def copy(leaf: jax.Array, good: jax.Array) -> jax.Array:
        spec = like.sharding.spec
        return jax.shard_map(of_this_device, mesh=mesh, in_specs=(spec, own.spec), out_specs=spec,
                             check_vma=False)(_on_device(leaf, like), good)

    return jax.jit(copy, out_shardings=like.sharding)(leaf, jax.device_put(is_source, own))


def _on_device(leaf: jax.Array, like: Any) -> jax.Array:
    """An array of the state where it can be computed with."""
    if like.sharding.memory_kind != HOST_MEMORY:
        return leaf
    return jax.device_put(leaf, like.sharding.with_memory_kind("device"))
