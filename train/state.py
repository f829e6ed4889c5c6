"""The training state: what a checkpoint holds, and where each of its arrays lives on the mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from batiste.models import Transformer, TransformerConfig, letters_tree
from batiste.sharding import HOST_MEMORY, MeshConfig, check_divisible, shardings
from batiste.train.config import TrainConfig
from batiste.train.optimizer import make_optimizer, optimizer_letters
from batiste.train.precision import LossScale, initial_loss_scale
from batiste.train.schedule import make_schedule


class TrainState(NamedTuple):
    """All that the next step depends on, besides the batch of that step.

    step: updates done, int32; it is also the position in the data and the seed of dropout.
    loss_scale: None unless the compute dtype is float16.
    """

    step: jax.Array
    params: Any
    optimizer_state: Any
    loss_scale: LossScale | None


class Program(NamedTuple):
    """A model and an optimizer laid out on a mesh, without a single array allocated.

    graphdef: the model's structure; `nnx.merge(graphdef, params)` is the model.
    letters: the parameters' letters. abstract_state: shapes, dtypes and shardings of the state.
    gradient_shardings: where gradients live between the backward pass and the optimizer.
    layout: the mesh config that all of it follows.
    """

    graphdef: Any
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    letters: Any
    abstract_state: TrainState
    gradient_shardings: Any
    layout: MeshConfig
    initialize: Callable[[], TrainState]


def make_program(
    model_config: TransformerConfig,
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    layout: MeshConfig,
) -> Program:
    """Lays a model out on a mesh that was made from `layout`.

    Raises ValueError for a config that cannot be, or a dim that its mesh axis does not divide.
    """
    config.validate()
    zero = layout.zero
    build = functools.partial(Transformer, model_config)
    abstract = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(config.seed)))
    graphdef, abstract_params = nnx.split(abstract, nnx.Param)
    letters = letters_tree(abstract_params)
    schedule = make_schedule(config.schedule, config.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule, letters)

    def initialize() -> TrainState:
        params = nnx.to_pure_dict(nnx.state(build(rngs=nnx.Rngs(config.seed)), nnx.Param))
        scaled = model_config.dtype == "float16"
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            optimizer_state=optimizer.init(params),
            loss_scale=initial_loss_scale(config.loss_scale) if scaled else None,
        )

    shapes = jax.eval_shape(initialize)
    state_letters = TrainState(
        step="",
        params=letters,
        optimizer_state=optimizer_letters(optimizer, shapes.params, letters),
        loss_scale=jax.tree.map(lambda _: "", shapes.loss_scale),
    )
    jax.tree.map(
        lambda letters, leaf: check_divisible(mesh, letters, leaf.shape, zero=zero >= 1),
        letters, shapes.params,
    )
    state_shardings = TrainState(
        step=shardings(mesh, state_letters.step),
        params=shardings(mesh, letters, zero=zero >= 3),
        optimizer_state=_kept(
            shardings(mesh, state_letters.optimizer_state, zero=zero >= 1), shapes.optimizer_state,
            layout.offload_optimizer,
        ),
        loss_scale=shardings(mesh, state_letters.loss_scale),
    )
    abstract_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes, state_shardings,
    )
    return Program(
        graphdef, optimizer, schedule, letters, abstract_state,
        gradient_shardings=shardings(mesh, letters, zero=zero >= 2),
        layout=layout,
        initialize=jax.jit(initialize, out_shardings=state_shardings),
    )


def _kept(device_shardings: Any, shapes: Any, on_host: bool) -> Any:
    """The shardings of the optimizer's state between updates; counts stay on the device."""
    if not on_host:
        return device_shardings
    return jax.tree.map(
        lambda sharding, leaf: sharding.with_memory_kind(HOST_MEMORY) if leaf.ndim else sharding,
        device_shardings, shapes,
    )
