"""Faults that are put into a run on purpose, to see that they are found; nothing unless asked.

`train.faults="nan_gradient:layer=2:step=30"`: a kind, and what it needs by name. Without `step` it is
the first; what ends by itself lasts one step, or `steps`.

| kind | from `step` on | ends |
|---|---|---|
| nan_gradient | the gradient of `layer`'s attention output is NaN | yes |
| activation | what attention adds to the residual stream in `layer` is `factor` (100) times as much | yes |
| garbage | batches are random tokens | yes |
| repeated_document | every row of a batch is its first | yes |
| learning_rate | `factor` (100) times the learning rate | no |
| dead_layer | the feed-forward units of `layer` answer nothing | no |
| frozen | the parameters of `layers` (1) layers from `layer` on do not move; without it, none do | no |
| no_gradient | the gradient of `layers` (1) layers from `layer` on is zero | no |
| shifted_targets | the target of a place is that of the place before: its own input | no |
| same_batch | every batch is the first of them | no |
| slow_host | every batch is `seconds` (1) late | no |
| flipped_bit | a bit of the last parameter is another on the `device`-th (0) device of the mesh | yes |

Faults of data belong to a batch and not to a step: a run that skips the batch is rid of them.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batiste.data import Batch
from batiste.train.schedule import check_choice

LASTING = (
    "learning_rate", "dead_layer", "frozen", "no_gradient", "shifted_targets", "same_batch",
    "slow_host",
)
OF_LAYER = ("nan_gradient", "activation", "dead_layer", "no_gradient")
OF_DATA = ("garbage", "repeated_document")
KINDS = ("nan_gradient", "activation", "flipped_bit", *OF_DATA, *LASTING)


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault; step counts from 1, layer from 0 by depth."""

    kind: str
    step: int = 1
    steps: int = 1
    layer: int | None = None
    layers: int = 1
    factor: float = 100.0
    seconds: float = 1.0
    device: int = 0

    def now(self, step: Any) -> Any:
        """Whether the fault is there in a step: a boolean, or an array of one."""
        if self.kind in LASTING:
            return step >= self.step
        return (step >= self.step) & (step < self.step + self.steps)


def parse_fault(text: str | None) -> Fault | None:
    """The fault that a config asks for; ValueError, naming the field, for one that is not known."""
    if text is None:
        return None
    kind, *options = text.split(":")
    check_choice("train.faults", kind, KINDS)
    types = {"step": int, "steps": int, "layer": int, "layers": int, "factor": float,
             "seconds": float, "device": int}
    values = {}
    for option in options:
        name, _, value = option.partition("=")
        try:
            values[name] = types[name](value)
        except (KeyError, ValueError):
            raise ValueError(
                f"train.faults={text!r}: expected {kind}:name=number with names among "
                f"{', '.join(types)}, got {option!r}"
            ) from None
    if kind in OF_LAYER and "layer" not in values:
        raise ValueError(f"train.faults={text!r}: a {kind} is in a layer; add :layer=0")
    return Fault(kind, **values)


def faulty_params(fault: Fault | None, params: Any, step: jax.Array, places: np.ndarray) -> Any:
    """What the forward pass of a step uses. places: where the layer of each depth is stored."""
    if fault is None or fault.kind not in ("activation", "dead_layer"):
        return params
    path, factor = ("attention", "out_NHD"), fault.factor
    if fault.kind == "dead_layer":
        path, factor = ("feed_forward", "up_DF"), 0.0
        if "feed_forward" not in params["layers"]:
            raise ValueError("train.faults=dead_layer: this model has experts alone and no units")
    return _scaled(params, path, places[fault.layer], jnp.where(fault.now(step), factor, 1.0))


def faulty_gradients(fault: Fault | None, gradients: Any, step: jax.Array, places) -> Any:
    """What the optimizer is given."""
    if fault is not None and fault.kind == "no_gradient":
        return _without_layers(fault, gradients, step, places)
    if fault is None or fault.kind != "nan_gradient":
        return gradients
    factor = jnp.where(fault.now(step), jnp.nan, 1.0)
    return _scaled(gradients, ("attention", "out_NHD"), places[fault.layer], factor)


def faulty_updates(fault: Fault | None, updates: Any, step: jax.Array, places) -> Any:
    """What is added to the parameters."""
    if fault is None or fault.kind not in ("learning_rate", "frozen"):
        return updates
    if fault.kind == "learning_rate" or fault.layer is None:
        factor = fault.factor if fault.kind == "learning_rate" else 0.0
        factor = jnp.where(fault.now(step), factor, 1.0)
        return jax.tree.map(lambda update: update * factor, updates)
    return _without_layers(fault, updates, step, places)


def _without_layers(fault: Fault, tree: Any, step: jax.Array, places) -> Any:
    """The tree with zeros in the layers of the fault."""
    factor = jnp.where(fault.now(step), 0.0, 1.0)
    chosen = places[fault.layer:fault.layer + fault.layers]
    layers = jax.tree.map(lambda leaf: leaf.at[chosen].multiply(factor), tree["layers"])
    return tree | {"layers": layers}


def faulty_state(fault: Fault | None, params: Any, step: jax.Array, like: Any) -> Any:
    """The parameters after a step. like: the same with their shardings."""
    if fault is None or fault.kind != "flipped_bit":
        return params
    leaves, structure = jax.tree.flatten(params)
    sharding = jax.tree.leaves(like)[-1].sharding

    def flip(part: jax.Array) -> jax.Array:
        here = jax.lax.axis_index(sharding.mesh.axis_names) == fault.device
        words = jax.lax.bitcast_convert_type(part, jnp.uint32).reshape(-1)
        words = words.at[0].set(jnp.where(here & fault.now(step), words[0] ^ 2, words[0]))
        return jax.lax.bitcast_convert_type(words.reshape(part.shape), part.dtype)

    leaves[-1] = jax.shard_map(
        flip, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec, check_vma=False,
    )(leaves[-1])
    return jax.tree.unflatten(structure, leaves)


def _scaled(tree: Any, path: tuple[str, str], place: int, factor: jax.Array) -> Any:
    """The tree with one layer of one parameter multiplied."""
    part, name = path
    leaf = tree["layers"][part][name]
    changed = tree["layers"][part] | {name: leaf.at[place].multiply(factor)}
    return tree | {"layers": tree["layers"] | {part: changed}}


def faulty_batches(
    fault: Fault | None, numbered: Iterator[tuple[int, Batch]], vocab_size: int
) -> Iterator[Batch]:
    """The batches of an iterator of (position, batch), with the fault of the host if it has one."""
    same = None
    for place, batch in numbered:
        if fault is not None and fault.now(place + 1):
            same = batch if same is None else same
            if fault.kind == "slow_host":
                time.sleep(fault.seconds)
            elif fault.kind == "repeated_document":
                batch = jax.tree.map(lambda x: np.repeat(x[:1], len(x), axis=0), batch)
            elif fault.kind == "garbage":
                batch = _garbage(batch, place, vocab_size)
            elif fault.kind == "shifted_targets":
                batch = batch._replace(targets_BT=np.roll(batch.targets_BT, 1, axis=1))
            elif fault.kind == "same_batch":
                batch = same
        yield batch


def _garbage(batch: Batch, place: int, vocab_size: int) -> Batch:
    rows, length = batch.tokens_BT.shape
    random = np.random.default_rng((place, int(batch.tokens_BT[0].sum())))
    stream = random.integers(0, vocab_size, (rows, length + 1)).astype(np.int32)
    return batch._replace(tokens_BT=stream[:, :-1], targets_BT=stream[:, 1:])
