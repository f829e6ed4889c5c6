"""Optimizers as Optax chains, told apart parameter by parameter by the letters of their dims.

The chain is the same for every kind: clip by value, clip by global norm, precondition (the kind),
add decoupled weight decay, scale by the group's multiplier, scale by the schedule.

What the letters of a parameter mean to the optimizer, after the stacking dims (a leading L, then a
leading E) are set aside and head dims are read as one group ("NH", "KH"):

| letters left             | group     | decayed | example                              |
|--------------------------|-----------|---------|--------------------------------------|
| one group, or none       | vector    | no      | "LD" norm, "LNH" bias, "LN" sinks    |
| two, first V, T or P     | embedding | yes     | "VD" tokens, "TD" positions          |
| two, the second is V, Y  | head      | yes     | "DV" tokens, "DY" classes            |
| two, any others          | matrix    | yes     | "LDNH", "LNHD", "LDF", "LEDF", "LDE" |
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from batiste.fields import Config, check_types
from batiste.train.schedule import check_choice

KINDS = ("adamw", "sgd", "adafactor", "lion", "muon")
# Optimizers of your own (docs/extend.md): OptimizerConfig -> what precondition gradients.
OWN_KINDS: dict[str, Callable[["OptimizerConfig"], optax.GradientTransformation]] = {}

# Adafactor factors the second moment over a parameter's two largest dims if both reach this size.
FACTOR_MINIMUM = 128
# Root mean square of one Muon update, that of AdamW in practice, so that both share one learning
# rate and weight decay: Liu et al. 2025 (arXiv:2502.16982), section 2.2.
MUON_UPDATE_RMS = 0.2


@dataclasses.dataclass
class OptimizerConfig(Config):
    """How gradients become updates.

    `beta1`, `beta2` are read by adamw, lion and the AdamW part of muon; `epsilon` by adamw and
    muon; `momentum` by sgd (0 is plain SGD) and muon. Adafactor has no such numbers: its decay
    is 1 − t^−0.8. Weight decay is decoupled and, like the update, scaled by the learning rate and
    the group's multiplier. A multiplier of 0 freezes the group. `router_bias_rate` is how far a step
    moves a router's bias, which has no gradient (arXiv:2408.15664 uses 0.001 throughout).
    """

    kind: str = "adamw"  # adamw, sgd, adafactor, lion, muon, or FILE.py:NAME of your own
    beta1: float = 0.9  # decay of the mean of gradients (adamw, lion, muon's AdamW part)
    beta2: float = 0.95  # decay of the mean of their squares, or lion's second decay
    epsilon: float = 1e-8  # added to the root of the mean of squares (adamw, muon)
    momentum: float = 0.95  # of sgd, where 0 is plain SGD, and of muon
    weight_decay: float = 0.1  # decoupled; scaled by the learning rate, as the update is
    clip_norm: float | None = 1.0  # largest norm of the whole gradient; None: no clipping
    clip_value: float | None = None  # largest size of each element, before clip_norm; None: none
    embedding_multiplier: float = 1.0  # of the learning rate of embeddings; 0 freezes them
    head_multiplier: float = 1.0  # the same of the output matrix
    matrix_multiplier: float = 1.0  # the same of all other matrices
    vector_multiplier: float = 1.0  # the same of norms and biases
    router_bias_rate: float = 1e-3  # how far a step moves the bias of a router, which has no gradient

    def validate(self) -> None:
        """Raises ValueError, naming the field, if a field is out of its range."""
        check_types(self, "train.optimizer.")
        check_choice("train.optimizer.kind", self.kind, (*KINDS, *OWN_KINDS))
        for field in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(
                    f"train.optimizer.{field}: expected in [0, 1), got {getattr(self, field)}")
        for field in ("epsilon", "clip_norm", "clip_value"):
            value = getattr(self, field)
            if not (value is None and field.startswith("clip")) and not value > 0:
                raise ValueError(f"train.optimizer.{field}: expected > 0, got {value}"
                                 + ("; None means no clipping" if field != "epsilon" else ""))
        for field in ("weight_decay", "embedding_multiplier", "head_multiplier",
                      "matrix_multiplier", "vector_multiplier", "router_bias_rate"):
            if not getattr(self, field) >= 0:
                raise ValueError(
                    f"train.optimizer.{field}: expected >= 0, got {getattr(self, field)}")

    @property
    def multipliers(self) -> dict[str, float]:
        """Learning-rate multiplier of each parameter group."""
        return {"embedding": self.embedding_multiplier, "head": self.head_multiplier,
                "matrix": self.matrix_multiplier, "vector": self.vector_multiplier}


def _sides(letters: str) -> list[str]:
    """Groups of dims that belong together: "LDNH" -> ["D", "NH"], "LNH" -> ["NH"]."""
    sides = re.findall(r"[NKG]*H|.", re.sub(r"^L?E?", "", letters))
    if len(sides) > 2:
        raise ValueError(f"parameter letters {letters!r}: expected at most an input and an output "
                         f"group besides L and E, got {sides}")
    return sides


def parameter_group(letters: str) -> str:
    """Returns embedding, head, matrix or vector for a parameter's letters (see the module)."""
    match _sides(letters):
        case ["V" | "T" | "P", _]:
            return "embedding"
        case [_, "V" | "Y"]:
            return "head"
        case [_, _]:
            return "matrix"
    return "vector"


def is_decayed(letters: str) -> bool:
    """Whether weight decay applies: to whatever maps an input group to an output group."""
    return parameter_group(letters) != "vector"


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule,
                   letters_tree: Any) -> optax.GradientTransformation:
    """Returns the whole chain from gradients to the updates to be added to the parameters.

    `letters_tree` has the structure of the parameters, each leaf the letters of that parameter.
    Every update of a stacked parameter is, layer by layer, the update that layer alone would get.

    Raises:
        ValueError: a field is out of range, or letters that describe no known parameter.
    """
    config.validate()
    multipliers = jax.tree.map(lambda letters: config.multipliers[parameter_group(letters)],
                               letters_tree)
    return optax.chain(
        optax.identity() if config.clip_value is None else optax.clip(config.clip_value),
        optax.identity() if config.clip_norm is None else
        optax.clip_by_global_norm(config.clip_norm),
        _with_standard_promotion(_preconditioner(config, letters_tree)),
        optax.add_decayed_weights(config.weight_decay, jax.tree.map(is_decayed, letters_tree)),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, multipliers, updates)),
        _scale_by_rate_of_step(schedule),
    )


def _scale_by_rate_of_step(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Scales by minus the learning rate of `step`, an argument of the update.

    Optax's own transformation counts the updates that were made, and falls behind the steps of a
    run for ever where one is skipped (float16, train.health.policies). Its state is kept, and what
    it counts is used where no step is given.
    """
    def update(updates, state, params=None, *, step=None, **_):
        del params
        count = state.count if step is None else step
        rate = -schedule(count)
        updates = jax.tree.map(lambda update: jnp.array(rate, dtype=update.dtype) * update, updates)
        return updates, optax.ScaleByScheduleState(count=count + 1)

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32)), update)


def _with_standard_promotion(
        inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Optax raises a float to an integer count, which strict dtype promotion refuses."""
    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def _preconditioner(config: OptimizerConfig, letters_tree: Any) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.kind in OWN_KINDS:
        return OWN_KINDS[config.kind](config)
    match config.kind:
        case "adamw":
            return adam
        case "lion":
            return optax.scale_by_lion(config.beta1, config.beta2)
        case "sgd":
            return optax.trace(config.momentum) if config.momentum else optax.identity()
        case "adafactor":
            return optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=FACTOR_MINIMUM),
                               _relative_step(letters_tree))
    kinds = jax.tree.map(
        lambda letters: "muon" if parameter_group(letters) == "matrix" else "adam", letters_tree)
    return optax.partition({"muon": _muon(config, letters_tree), "adam": adam}, kinds)


def _relative_step(letters_tree: Any) -> optax.GradientTransformation:
    """Clips each layer's update to root mean square 1 and scales it by that of the parameter.

    Shazeer and Stern 2018 (arXiv:1804.04235), algorithm 4. Optax's own two transformations take
    the mean over the whole leaf, which would couple the layers stacked in it.
    """
    def rescale(letters, update, parameter):
        stacked = len(letters) - sum(map(len, _sides(letters)))
        if max(update.shape[:stacked], default=0) >= FACTOR_MINIMUM:
            raise ValueError(f"train.optimizer.kind: adafactor supports fewer than "
                             f"{FACTOR_MINIMUM} stacked layers (and experts), got "
                             f"{max(update.shape[:stacked])}; it would factor the second moment "
                             "across layers: use adamw, lion or muon")

        def root_mean_square(x):
            return jnp.sqrt(jnp.mean(x * x, axis=tuple(range(stacked, x.ndim)), keepdims=True))

        update = update / jnp.maximum(1.0, root_mean_square(update))
        return update * jnp.maximum(1e-3, root_mean_square(parameter))

    return optax.stateless(
        lambda updates, params: jax.tree.map(rescale, letters_tree, updates, params))


def _muon(config: OptimizerConfig, letters_tree: Any) -> optax.GradientTransformation:
    """Orthogonalized momentum for the hidden matrices: Jordan et al. 2024, Liu et al. 2025.

    Dims that are neither input nor output (L, E) are batch dims: each matrix on its own.
    """
    def dimension_numbers(letters):
        if parameter_group(letters) != "matrix":
            return optax.MaskedNode()
        (first, last), end = _sides(letters), len(letters)
        start = end - len(last)
        return MuonDimensionNumbers(tuple(range(start - len(first), start)),
                                    tuple(range(start, end)))

    def scale(update, numbers):
        fans = [math.prod(update.shape[dim] for dim in dims) for dims in numbers]
        return update * (MUON_UPDATE_RMS * math.sqrt(max(fans)))

    numbers_tree = jax.tree.map(dimension_numbers, letters_tree)
    return optax.chain(
        scale_by_muon(beta=config.momentum, weight_dimension_numbers=numbers_tree),
        optax.stateless(lambda updates, _: jax.tree.map(scale, updates, numbers_tree)))


def optimizer_letters(optimizer: optax.GradientTransformation, params: Any,
                      letters_tree: Any) -> Any:
    """Returns the tree of `optimizer.init(params)` with letters for leaves, to shard it by.

    A moment gets its parameter's letters, Adafactor's factored moments the letters of the dims
    they kept ("LDF" -> "LD" and "LF"), counts and placeholders "" (replicated). `params` need only
    have shapes and dtypes. Nothing is allocated.

    Raises:
        ValueError: a parameter whose letters do not match its rank.
    """
    # A state leaf is read through its shape, so give each parameter dims of distinct sizes, in the
    # order of the real ones and on the same side of the threshold that Adafactor looks at.
    def stand_in(path, letters, parameter):
        if len(letters) != len(parameter.shape):
            raise ValueError(f"letters of parameter {jax.tree_util.keystr(path)}: expected "
                             f"{len(parameter.shape)} for shape {parameter.shape}, got {letters!r}")
        order = sorted(range(len(letters)), key=lambda dim: parameter.shape[dim])
        shape = tuple(order.index(dim) + (FACTOR_MINIMUM if size >= FACTOR_MINIMUM else 2)
                      for dim, size in enumerate(parameter.shape))
        return jax.ShapeDtypeStruct(shape, parameter.dtype)

    def read(state_leaf, letters, parameter):
        if isinstance(state_leaf, optax.MaskedNode):
            return state_leaf
        letter_of_size = dict(zip(parameter.shape, letters, strict=True))
        return "".join(letter_of_size.get(size, "") for size in state_leaf.shape)

    stand_ins = jax.tree_util.tree_map_with_path(stand_in, letters_tree, params)
    return optax.tree_map_params(
        optimizer, read, jax.eval_shape(optimizer.init, stand_ins), letters_tree, stand_ins,
        transform_non_params=lambda _: "",
        is_leaf=lambda node: isinstance(node, optax.MaskedNode))
