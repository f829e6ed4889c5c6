"""The training state: what a checkpoint holds, and where each of its arrays lives on the mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from batiste.models import Transformer, TransformerConfig, letters_tree
from batiste.sharding import (
    HOST_MEMORY, MeshConfig, check_divisible, restack, restacked, shardings,
)
from batiste.train.config import TrainConfig
from batiste.train.local_steps import Workers, outer_optimizer
from batiste.train.optimizer import make_optimizer, optimizer_letters
from batiste.train.precision import LossScale, initial_loss_scale
from batiste.train.schedule import make_schedule


class TrainState(NamedTuple):
    """All that the next step depends on, besides the batch of that step.

    step: updates done, int32; it is also the position in the data and the seed of dropout.
    params: the model, as evaluation and generation see it. loss_scale: None unless the compute
    dtype is float16. workers: None unless slices take local steps; then they hold what each slice
    trains, params are what the slices last agreed on, and optimizer_state is the outer optimizer's.
    """

    step: jax.Array
    params: Any
    optimizer_state: Any
    loss_scale: LossScale | None
    workers: Workers | None = None


class Program(NamedTuple):
    """A model and an optimizer laid out on a mesh, without a single array allocated.

    graphdef: the model's structure; `nnx.merge(graphdef, params)` is the model.
    letters: the parameters' letters. abstract_state: shapes, dtypes and shardings of the state.
    layout: the mesh config that all of it follows. begin: the state before the first step, of
    parameters laid out as abstract_state says; `initialize` draws them first.
    """

    graphdef: Any
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    letters: Any
    abstract_state: TrainState
    layout: MeshConfig
    initialize: Callable[[], TrainState]
    begin: Callable[[Any], TrainState]


def make_program(
    model_config: TransformerConfig,
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    layout: MeshConfig,
    module: Callable[..., nnx.Module] = Transformer,
) -> Program:
    """Lays a model out on a mesh that was made from `layout`.

    module: makes the model of its config and `rngs`; what a Transformer is only a part of.
    Raises ValueError for a config that cannot be, or a dim that its mesh axis does not divide.
    """
    config.validate()
    build = functools.partial(module, model_config)
    abstract = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(config.seed)))
    graphdef, abstract_params = nnx.split(abstract, nnx.Param)
    letters = letters_tree(abstract_params)
    schedule = make_schedule(config.schedule, config.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule, letters)
    slices = mesh.shape["slice"]

    def initialize() -> TrainState:
        params = nnx.to_pure_dict(nnx.state(build(rngs=nnx.Rngs(config.seed)), nnx.Param))
        params = jax.tree.map(
            lambda leaf, name: restacked(leaf, 0 if name[:1] == "L" else None, MeshConfig(), layout),
            params, letters,
        )
        return begin(params)

    def begin(params: Any) -> TrainState:
        scaled = model_config.dtype == "float16"
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            optimizer_state=optimizer.init(params),
            loss_scale=initial_loss_scale(config.loss_scale) if scaled else None,
        )
        return state if config.local.steps is None else _with_workers(state, config, slices)

    shapes = jax.eval_shape(initialize)
    split = layout.zero >= 1 or slices > 1
    jax.tree.map(
        lambda letters, leaf: check_divisible(mesh, letters, leaf.shape, zero=split),
        letters, shapes.params,
    )
    state_shardings = _shardings(mesh, layout, letters, (optimizer, config, shapes))
    abstract_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes, state_shardings,
    )
    return Program(
        graphdef, optimizer, schedule, letters, abstract_state, layout,
        initialize=jax.jit(initialize, out_shardings=state_shardings),
        begin=jax.jit(begin, out_shardings=state_shardings, donate_argnums=0),
    )


def from_checkpoint(program: Program, state: TrainState, stored: MeshConfig) -> TrainState:
    """A state that was saved on mesh `stored`, with its layers in the program's order."""
    targets = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    return restack(state, stored, program.layout, targets)


def _kept(device_shardings: Any, shapes: Any, layout: MeshConfig) -> Any:
    """The shardings of the optimizer's state between updates; counts stay on the device."""
    if not layout.offload_optimizer:
        return device_shardings
    return jax.tree.map(
        lambda sharding, leaf: sharding.with_memory_kind(HOST_MEMORY) if leaf.ndim else sharding,
        device_shardings, shapes,
    )


def _with_workers(state: TrainState, config: TrainConfig, slices: int) -> TrainState:
    """The state at the start of local steps: every slice has the same."""
    own = Workers(
        state.params, state.optimizer_state, state.loss_scale,
        residual=None if config.local.compression == "none"
        else jax.tree.map(jnp.zeros_like, state.params),
    )
    workers = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (slices, *leaf.shape)), own)
    outer_state = outer_optimizer(config.local).init(state.params)
    return state._replace(optimizer_state=outer_state, loss_scale=None, workers=workers)


def _shardings(
    mesh: jax.sharding.Mesh, layout: MeshConfig, letters: Any, rest: tuple
) -> TrainState:
    """Where each array of the state lives; `rest`: optimizer, config, the state's shapes."""
    zero, (optimizer, config, shapes) = layout.zero, rest
    inner = optimizer_letters(optimizer, shapes.params, letters)
    if config.local.steps is None:
        return TrainState(
            step=shardings(mesh, ""),
            params=shardings(mesh, letters, zero=zero >= 3),
            optimizer_state=_kept(
                shardings(mesh, inner, zero=zero >= 1), shapes.optimizer_state, layout),
            loss_scale=jax.tree.map(lambda _: shardings(mesh, ""), shapes.loss_scale),
        )
    workers = Workers(
        params=shardings(mesh, letters, zero=zero >= 3, each_slice=True),
        optimizer_state=_kept(
            shardings(mesh, inner, zero=zero >= 1, each_slice=True),
            jax.eval_shape(optimizer.init, shapes.params), layout),
        loss_scale=jax.tree.map(
            lambda _: shardings(mesh, "", each_slice=True), shapes.workers.loss_scale),
        residual=None if shapes.workers.residual is None
        else shardings(mesh, letters, zero=True, each_slice=True),
    )
    # Only an exchange reads the outer optimizer's state, and it works on shares.
    outer = optimizer_letters(outer_optimizer(config.local), shapes.params, letters)
    return TrainState(
        step=shardings(mesh, ""),
        params=shardings(mesh, letters, zero=zero >= 3),
        optimizer_state=shardings(mesh, outer, zero=True),
        loss_scale=None,
        workers=workers,
    )
