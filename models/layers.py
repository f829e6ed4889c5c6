"""Products with weights, norms, the feed-forward, dropout."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from batiste.models.config import TransformerConfig
from batiste.models.parameter import matrix, vector
from batiste.models.parts import ACTIVATIONS, NORMS
from batiste.sharding import axes_of, constrain, gather, per_device, spec

# The name of what leaves a product with weights: inside a custom gradient no policy of
# rematerialization sees the product itself.
PRODUCT = "product"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(
    x: jax.Array, w: jax.Array, dims: tuple[int, ...] = (0,), dtype: Any = None
) -> jax.Array:
    """Sums the last dims of x with `dims` of w, its first or its last; the result has x's dtype.

    Multiplies in x's dtype, accumulates in fp32; `dtype` overrides that of the result. The gradient
    of w is accumulated in fp32 and never rounded to x's dtype. Autodiff alone would multiply fp32
    cotangents with bf16 operands, at fp32 speed: a bf16 step on a CPU took 1.9 times as long.
    """
    summed = tuple(range(x.ndim - len(dims), x.ndim))
    accumulated = sum_dtype(x) if dtype is None else jnp.float32
    product = dot(x, w.astype(x.dtype), summed, dims, accumulated)
    return product.astype(x.dtype if dtype is None else dtype)


def dot(a: jax.Array, b: jax.Array, dims_of_a: tuple, dims_of_b: tuple, dtype=jnp.float32):
    """The sum over these dims of two arrays, accumulated and returned in `dtype`."""
    dims = ((dims_of_a, dims_of_b), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)


def sum_dtype(x: jax.Array) -> Any:
    """The dtype in which an activation leaves its product.

    Where `tensor` splits what is summed, parts of the sum travel: in x's dtype they are half the
    bytes, and the TPU's compiler adds up those of q, k and v before it sends them (of five fp32
    arrays a layer, backward, two in bf16 remained). Within a device the sum is fp32 in either case.
    """
    tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    return x.dtype if tensor > 1 else jnp.float32


def _project_forward(x, w, dims, dtype):
    return checkpoint_name(project(x, w, dims, dtype), PRODUCT), (x, w)


def _project_backward(dims, dtype, saved, gradient):
    x, w = saved
    w_dtype = w.dtype
    gradient = gradient.astype(x.dtype)
    rows = tuple(range(x.ndim - len(dims)))
    out_of_gradient = tuple(range(len(rows), gradient.ndim))
    out_of_w = tuple(dim for dim in range(w.ndim) if dim not in dims)
    w = w.astype(x.dtype)
    gradient_x = dot(gradient, w, out_of_gradient, out_of_w, sum_dtype(x))
    return gradient_x.astype(x.dtype), weight_gradient(x, gradient, rows, dims).astype(w_dtype)


def weight_gradient(x: jax.Array, gradient: jax.Array, rows: tuple, dims: tuple) -> jax.Array:
    """Sums x times gradient over rows (batch and time together), in the order of w's dims.

    Rows are contracted as they lie: on a CPU 2.5 times as fast as the product of a reshaped x.T, and
    no sharded dim is reshaped. XLA's CPU backend transposes the left operand, slowly when it is wide
    (80 ms instead of 4 for an fp32 feed-forward), so the narrow one goes there. The barrier keeps
    XLA from folding the transpose into the product, which in bf16 it then cannot run.
    """
    if dims[0] != 0:
        return dot(gradient, x, rows, rows)
    if math.prod(x.shape[len(rows):]) <= math.prod(gradient.shape[len(rows):]):
        return dot(x, gradient, rows, rows)
    product = jax.lax.optimization_barrier(dot(gradient, x, rows, rows))
    num_left = gradient.ndim - len(rows)
    return product.transpose(*range(num_left, product.ndim), *range(num_left))


project.defvjp(_project_forward, _project_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: jax.Array, places_BT: jax.Array, letters: str) -> jax.Array:
    """The rows of a table ("VD" or "TD", by `letters`) at these places, in its dtype.

    It and its gradient are said device by device: inside one of several slices XLA's partitioner
    dies of the lookup, and gathers the activations of all devices for its gradient.
    """
    axes, table_spec = _table_axes(letters)

    def of_this_device(table: jax.Array, places_BT: jax.Array) -> jax.Array:
        if not axes:
            return table[places_BT]
        here_BT, is_here_BT = _places_here(places_BT, axes, table.shape[0])
        return jax.lax.psum(jnp.where(is_here_BT[..., None], table[here_BT], 0), axes)

    return per_device(of_this_device, (table_spec, spec("BT")), spec("BTD"))(table, places_BT)


def _lookup_backward(letters, saved, gradient_BTD):
    """Each device adds up the rows that it has, then all that share its part of the table do."""
    places_BT, size = saved
    axes, table_spec = _table_axes(letters)
    row_axes = axes_of("BT")

    def of_this_device(places_BT: jax.Array, gradient_BTD: jax.Array) -> jax.Array:
        rows = size // math.prod(jax.lax.axis_size(axis) for axis in axes)
        sums = jnp.zeros((rows, gradient_BTD.shape[-1]), gradient_BTD.dtype)
        if axes:
            places_BT, is_here_BT = _places_here(places_BT, axes, rows)
            gradient_BTD = jnp.where(is_here_BT[..., None], gradient_BTD, 0)
        return jax.lax.psum(sums.at[places_BT].add(gradient_BTD), row_axes)

    specs = (spec("BT"), spec("BTD")), table_spec
    return per_device(of_this_device, *specs)(places_BT, gradient_BTD), None


def _table_axes(letters: str) -> tuple[tuple[str, ...], PartitionSpec]:
    """What splits the rows of a table that is looked up; one of places is whole over `context`."""
    axes = tuple(axis for axis in axes_of(letters) if axis not in axes_of("BT"))
    return axes, PartitionSpec(axes or None, None)


def _places_here(places_BT: jax.Array, axes: tuple[str, ...], rows: int) -> tuple:
    """Places in this device's part of a table, 0 where they are in another's; which are here."""
    here_BT = places_BT - jax.lax.axis_index(axes) * rows
    is_here_BT = (here_BT >= 0) & (here_BT < rows)
    return jnp.where(is_here_BT, here_BT, 0), is_here_BT


lookup.defvjp(
    lambda table, places_BT, letters: (
        lookup(table, places_BT, letters), (places_BT, table.shape[0])),
    _lookup_backward,
)


def add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """Adds a bias over the last dims of x; None adds nothing."""
    if bias is None:
        return x
    return x + jnp.expand_dims(bias[...].astype(x.dtype), range(x.ndim - bias.ndim))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries with probability `rate` and rescales the others; key None turns it off."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


class Norm(nnx.Module):
    """RMSNorm (arXiv:1910.07467), LayerNorm (arXiv:1607.06450) or your own over the last dim, in fp32."""

    def __init__(self, config: TransformerConfig, letter: str = "D", size: int | None = None):
        sizes = config.sizes if size is None else {letter: size}
        self.normalize, self.epsilon = NORMS[config.norm], config.norm_epsilon
        self.plus_one = config.norm == "rms_plus_one"
        has_bias = config.norm == "layer" and config.bias == "all"
        start = 0.0 if self.plus_one else 1.0
        setattr(self, f"scale_{letter}", vector(letter, sizes, start))
        setattr(self, f"bias_{letter}", vector(letter, sizes, 0.0) if has_bias else None)
        self.letter = letter

    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = getattr(self, f"scale_{self.letter}"), getattr(self, f"bias_{self.letter}")
        y = self.normalize(x.astype(jnp.float32), self.epsilon)
        scale = 1 + scale[...] if self.plus_one else scale[...]
        y *= jnp.expand_dims(scale, range(x.ndim - 1))
        return add_bias(y, bias).astype(x.dtype)


class FeedForward(nnx.Module):
    """Two projections around an activation, or three with a gate (GLU, arXiv:2002.05202)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        sizes, stddev = config.sizes, config.init_stddev
        self.activation = config.activation
        self.up_DF = matrix(rngs, "DF", sizes, inputs="D", stddev=stddev)
        self.gate_DF = (
            matrix(rngs, "DF", sizes, inputs="D", stddev=stddev) if config.gated else None
        )
        self.down_FD = matrix(
            rngs, "FD", sizes, inputs="F", stddev=stddev, gain=residual_gain(config)
        )
        has_bias = config.bias == "all"
        self.up_bias_F = vector("F", sizes, 0.0) if has_bias else None
        self.gate_bias_F = vector("F", sizes, 0.0) if has_bias and config.gated else None
        self.down_bias_D = vector("D", sizes, 0.0) if has_bias else None

    def hidden(self, x_BTD: jax.Array) -> jax.Array:
        """What the units say, h_BTF."""
        h_BTF = checkpoint_name(add_bias(project(x_BTD, self.up_DF[...]), self.up_bias_F), "up")
        if self.gate_DF is None:
            h_BTF = activate(self.activation, h_BTF)
        else:
            gate_BTF = add_bias(project(x_BTD, self.gate_DF[...]), self.gate_bias_F)
            h_BTF *= activate(self.activation, checkpoint_name(gate_BTF, "gate"))
        return constrain(h_BTF, "BTF")

    def output(self, h_BTF: jax.Array) -> jax.Array:
        """What the residual stream gains by them, out_BTD."""
        return add_bias(project(h_BTF, self.down_FD[...]), self.down_bias_D)


class HeadTransform(nnx.Module):
    """What BERT has between its layers and its logits, and their bias (arXiv:1810.04805)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        sizes = config.sizes
        self.activation = config.activation
        self.weight_DR = matrix(rngs, "DR", sizes, inputs="D", stddev=config.init_stddev)
        self.bias_R = vector("R", sizes, 0.0)
        self.norm = Norm(config, "R")
        self.bias_V = vector("V", sizes, 0.0)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        h_BTR = add_bias(project(x_BTD, gather(self.weight_DR[...], "DR")), self.bias_R)
        return self.norm(activate(self.activation, h_BTR))


class ReplacedHead(nnx.Module):
    """Says of each token how likely it was replaced (ELECTRA, arXiv:2003.10555)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        sizes = config.sizes | {"R": config.model_dim, "P": 1}
        self.activation, stddev = config.activation, config.init_stddev
        self.weight_DR = matrix(rngs, "DR", sizes, inputs="D", stddev=stddev)
        self.bias_R = vector("R", sizes, 0.0)
        self.out_RP = matrix(rngs, "RP", sizes, inputs="R", stddev=stddev)
        self.out_bias_P = vector("P", sizes, 0.0)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """The logarithm of the odds, float32 BT."""
        h_BTR = add_bias(project(x_BTD, gather(self.weight_DR[...], "DR")), self.bias_R)
        h_BTR = activate(self.activation, h_BTR)
        odds_BTP = project(h_BTR, self.out_RP[...], (0,), jnp.float32)
        return add_bias(odds_BTP, self.out_bias_P)[:, :, 0]


def activate(name: str, x: jax.Array) -> jax.Array:
    """The nonlinearity of an activation by its config name, in fp32."""
    return ACTIVATIONS[name].apply(x.astype(jnp.float32)).astype(x.dtype)


def residual_gain(config: TransformerConfig) -> float:
    """Shrinks what is added to the residual stream 2 L times (GPT-2), so its variance stays O(1)."""
    return 1 / math.sqrt(2 * config.num_layers) if config.depth_scaled_init else 1.0
