"""Steps on a mesh against steps on one device: run them, compare them, read what they send."""

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from conftest import make_batch

from batiste.data import Batch
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig, layer_order, make_mesh, place
from batiste.train import TrainConfig, make_program, make_train_step

# Dims that tensor 4 and data 8 divide, all different: D 32, N 8, K 4, F 64, V 40.
WIDE = TransformerConfig(
    vocab_size=40, num_layers=3, model_dim=32, num_heads=8, num_kv_heads=4, head_dim=6, mlp_dim=64,
    max_length=16, bias="all", qk_norm=True, norm="layer",
)
BATCH = make_batch(8, 12, 40, 0)
TOLERANCE = 1e-6
_alone: dict[tuple, "Run"] = {}


class Run(NamedTuple):
    """Three steps: every metric of each, the parameters after (layers by depth), and with what."""

    history: dict[str, np.ndarray]
    params: Any
    mesh: jax.sharding.Mesh
    program: Any
    state: Any


def train_config(kind: str, accumulation: int = 1) -> TrainConfig:
    """Three steps; with SGD a step is the gradient itself, so all gradients are compared."""
    config = TrainConfig(num_steps=3, batch_size=8, accumulation=accumulation)
    config.schedule.warmup_steps = 1
    config.health.every = None
    config.optimizer.kind = kind
    config.schedule.learning_rate = 0.3 if kind == "sgd" else 1e-3
    return config


def start(config: TrainConfig, layout: MeshConfig, devices=None, model: TransformerConfig = WIDE):
    """The mesh, the program and the step."""
    mesh = make_mesh(layout, devices)
    program = make_program(model, config, mesh, layout)
    return mesh, program, make_train_step(program, config, mesh)


def place_batch(mesh, batch: Batch = BATCH) -> Batch:
    """A batch on a mesh, as a run places it: rows come whole in time."""
    return place(mesh, batch, jax.tree.map(lambda x: "BS"[: x.ndim], batch))


def three_steps(
    config: TrainConfig, layout: MeshConfig, model=WIDE, batch: Batch = BATCH, devices=None
) -> Run:
    """Three steps of one batch on a mesh."""
    mesh, program, step = start(config, layout, devices, model)
    state, measured = program.initialize(), []
    placed = place_batch(mesh, batch)
    for _ in range(3):
        state, metrics = step(state, placed)
        measured.append(jax.device_get(metrics))
    history = {name: np.array([each[name] for each in measured]) for name in measured[0]}
    params = by_depth(jax.device_get(state.params), layout, model.num_layers)
    return Run(history, params, mesh, program, state)


def alone(config: TrainConfig, model=WIDE, batch: Batch = BATCH) -> Run:
    """The same on the first device alone, computed once."""
    key = repr((config, model)), batch.tokens_BT.tobytes()
    if key not in _alone:
        devices = jax.devices()[:1]
        _alone[key] = three_steps(config, MeshConfig(data=1), model, batch, devices)
    return _alone[key]


def by_depth(params, layout: MeshConfig, num_layers: int):
    """Parameters with their layers in the order of the model, not of the stages."""
    places = np.argsort(layer_order(num_layers, layout.stage, layout.interleave))
    # Of shared layers there is one.
    return params | {"layers": jax.tree.map(
        lambda leaf: leaf[places[: len(leaf)]], params["layers"])}


def root_mean_square(x: np.ndarray) -> float:
    """The size of an array's typical element, in float64."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def errors(mine, theirs) -> dict[str, float]:
    """Of each array, relative to the size of the other's typical element.

    Biases begin at 0 and move by sums that cancel: below 0.01 the absolute error counts.
    """
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(theirs)]
    sizes = jax.tree.map(
        lambda a, b: root_mean_square(a - b) / max(root_mean_square(b), 0.01), mine, theirs)
    return dict(zip(paths, jax.tree.leaves(sizes), strict=True))


def largest_error(mine, theirs) -> float:
    """The largest of `errors`."""
    return float(np.max(list(errors(mine, theirs).values())))  # Python's max passes over NaN.


def check_equal(mine: Run, theirs: Run, later_norms: float = TOLERANCE) -> None:
    """Every metric, all gradients (a step of SGD is one) and three steps, to 1e-6.

    later_norms: what the gradients' norms of the second and the third step may differ by.
    """
    for name, expected in theirs.history.items():
        later = later_norms if name == "gradient_norm" else TOLERANCE
        measured = mine.history[name]
        np.testing.assert_allclose(measured[0], expected[0], rtol=TOLERANCE, err_msg=name)
        np.testing.assert_allclose(measured[1:], expected[1:], rtol=later, err_msg=name)
    found = errors(mine.params, theirs.params)
    assert all(error <= TOLERANCE for error in found.values()), found


def compiled(config: TrainConfig, layout: MeshConfig, model=WIDE, batch=BATCH, devices=None):
    """The program and its step, compiled for arguments that are not there."""
    mesh, program, step = start(config, layout, devices, model)
    with jax.set_mesh(mesh):
        return program, step.jitted.lower(
            program.abstract_state, place_batch(mesh, batch)).compile()


def collectives(text: str) -> dict[str, int]:
    """Bytes that each kind of collective yields on a device, from a compiled program's text."""
    total: dict[str, int] = {}
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        for dtype, dims in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", shapes):
            size = math.prod(int(dim) for dim in dims.split(",") if dim)
            total[kind] = total.get(kind, 0) + size * int(re.sub(r"\D", "", dtype)) // 8
    return total


def parameters(program) -> list[tuple[str, Any]]:
    """The letters and the shape of each parameter."""
    leaves = jax.tree.leaves(program.abstract_state.params)
    return list(zip(jax.tree.leaves(program.letters), leaves, strict=True))


def bytes_with_letter(program, letter: str) -> int:
    """Bytes of the parameters that have a letter, whole."""
    return sum(4 * leaf.size for letters, leaf in parameters(program) if letter in letters)


def check_bytes_per_device(mesh, program, state, moments: int) -> None:
    """What the rules say is what parameters, and so many arrays like them, take on a device."""
    sizes, zero = dict(mesh.shape), program.layout.zero

    def on_device(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    def expected(split_over_data):
        total = 0
        for letters, leaf in parameters(program):
            parts = sizes["tensor"] if set(letters) & set("NKFV") else 1
            parts *= sizes["stage"] if set(letters) & set("LV") else 1
            parts *= sizes["expert"] if "E" in letters else 1
            parts *= sizes["data"] if split_over_data and "D" in letters else 1
            total += leaf.size * leaf.dtype.itemsize // parts
        return total

    assert on_device(state.params) == expected(zero >= 3)
    counts = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer_state) if leaf.ndim == 0)
    assert on_device(state.optimizer_state) - counts == moments * expected(zero >= 1)
