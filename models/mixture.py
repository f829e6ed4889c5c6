"""A mixture of experts: each token through the few feed-forwards that its router chooses.

No token is dropped, however unbalanced the choice: copies of the tokens are sorted by expert and
multiplied group by group. Where the mesh splits experts, they travel to their experts and back.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from batiste.models import dispatch
from batiste.models.config import TransformerConfig
from batiste.models.layers import PRODUCT, activate, residual_gain
from batiste.models.parameter import matrix, vector
from batiste.models.router import RouterSums, route
from batiste.sharding import per_device, spec


class Mixture(nnx.Module):
    """The routed experts of one layer; the shared ones are a FeedForward beside it."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        sizes, stddev = config.sizes, config.init_stddev
        self.config = config
        self.router_DE = matrix(rngs, "DE", sizes, inputs="D", stddev=stddev)
        self.router_bias_E = vector("E", sizes, 0.0) if config.router_bias else None
        self.up_EDF = matrix(rngs, "EDF", sizes, inputs="D", stddev=stddev)
        self.gate_EDF = (
            matrix(rngs, "EDF", sizes, inputs="D", stddev=stddev) if config.gated else None
        )
        self.down_EFD = matrix(
            rngs, "EFD", sizes, inputs="F", stddev=stddev, gain=residual_gain(config)
        )

    def __call__(
        self, x_BTD: jax.Array, segments_BT: jax.Array | None, *, between_blocks: bool
    ) -> tuple[jax.Array, RouterSums]:
        """The experts' weighted sum, out_BTD, and the router's sums over tokens outside segment 0.

        between_blocks: how x_BTD and out_BTD lie on the mesh.
        """
        real_BT = jnp.ones(x_BTD.shape[:2], jnp.float32)
        if segments_BT is not None:
            real_BT = (segments_BT != 0).astype(jnp.float32)
        bias_E = None if self.router_bias_E is None else self.router_bias_E[...]
        chosen_BTC, weights_BTC, sums = route(
            x_BTD, self.router_DE[...], bias_E, real_BT, self.config, between_blocks=between_blocks
        )
        rows = spec("BTD", between_blocks=between_blocks)
        gate_EDF = None if self.gate_EDF is None else self.gate_EDF[...]
        weights = (self.up_EDF[...], gate_EDF, self.down_EFD[...])
        weight_specs = (spec("EDF"), None if gate_EDF is None else spec("EDF"), spec("EFD"))
        experts = functools.partial(_experts, self.config, between_blocks)
        experts = per_device(experts, (rows, rows, rows, weight_specs), rows)
        return experts(x_BTD, chosen_BTC, weights_BTC, weights), sums


def _experts(
    config: TransformerConfig, between_blocks: bool, x_BTD: jax.Array, chosen_BTC: jax.Array,
    weights_BTC: jax.Array, weights: tuple[jax.Array, jax.Array | None, jax.Array],
) -> jax.Array:
    """What one device does: with its tokens, its experts, and its share of their feed-forward dim.

    Time that is split over `tensor` is gathered first and the sums over `tensor` are scattered at
    the end, so that both have each other for a gradient.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    devices, tensor = sizes.get("expert", 1), sizes.get("tensor", 1)
    if tensor > 1 and between_blocks:
        x_BTD, chosen_BTC, weights_BTC = (
            jax.lax.all_gather(x, "tensor", axis=1, tiled=True)
            for x in (x_BTD, chosen_BTC, weights_BTC)
        )
    x_MD, chosen_MC, weights_MC = (
        x.reshape(-1, x.shape[-1]) for x in (x_BTD, chosen_BTC, weights_BTC)
    )
    routes = dispatch.plan(chosen_MC, config.num_experts, devices)
    rows = dispatch.room(chosen_MC, config.num_experts, devices)
    x_WD = dispatch.scatter(x_MD, routes, rows)
    y_WD = _feed_forward(config.activation, x_WD, weights, routes.load_E)
    out_BTD = dispatch.gather(y_WD, weights_MC, routes).reshape(x_BTD.shape)
    if tensor == 1:
        return out_BTD
    if not between_blocks:
        return jax.lax.psum(out_BTD, "tensor")
    return jax.lax.psum_scatter(out_BTD, "tensor", scatter_dimension=1, tiled=True)


def _feed_forward(
    activation: str, x_WD: jax.Array, weights: tuple[jax.Array, jax.Array | None, jax.Array],
    load_E: jax.Array,
) -> jax.Array:
    """The first load_E[0] rows through the first expert, and so on."""
    up_EDF, gate_EDF, down_EFD = weights
    h_WF = grouped_project(x_WD, up_EDF, load_E)
    if gate_EDF is None:
        h_WF = activate(activation, h_WF)
    else:
        h_WF *= activate(activation, grouped_project(x_WD, gate_EDF, load_E))
    return grouped_project(h_WF, down_EFD, load_E)


@jax.custom_vjp
def grouped_project(x: jax.Array, w: jax.Array, load_E: jax.Array) -> jax.Array:
    """Rows of x times the matrix of their group: load_E[e] rows by w[e], one group after another.

    Multiplies in x's dtype, accumulates in fp32, rounds to x's dtype; the gradient of w is never
    rounded. What follows the last group is zero or anything at all, and nobody looks at it.
    """
    return _grouped(x, w.astype(x.dtype), load_E, (1, 1), x.dtype)


def _grouped(x, w, load_E, dims: tuple[int, int], dtype: Any) -> jax.Array:
    """Contracts dims[0] of x with dims[1] of w, or of an x, the rows of which are summed."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((dims[0],), (dims[1],)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0] if w.ndim == 3 else [],
    )
    return jax.lax.ragged_dot_general(x, w, load_E, numbers, preferred_element_type=dtype)


def _grouped_backward(saved, gradient):
    x, w, load_E = saved
    gradient = gradient.astype(x.dtype)
    gradient_x = _grouped(gradient, w.astype(x.dtype), load_E, (1, 2), x.dtype)
    gradient_w = _grouped(x, gradient, load_E, (0, 0), jnp.float32)
    return gradient_x, gradient_w.astype(w.dtype), None


def _grouped_forward(x, w, load_E):
    return checkpoint_name(grouped_project(x, w, load_E), PRODUCT), (x, w, load_E)


grouped_project.defvjp(_grouped_forward, _grouped_backward)


def rebalanced(params: Any, load_LE: jax.Array, rate: float) -> Any:
    """Parameters after one step of the loss-free balancing rule (arXiv:2408.15664, algorithm 1).

    An expert with less than the mean load of its layer gets `rate` more bias, one with more so much
    less. Returns a model without router_bias as it is.
    """
    mixture = params["layers"]["mixture"]
    if "router_bias_E" not in mixture:
        return params
    error_LE = load_LE.mean(axis=1, keepdims=True) - load_LE
    bias_LE = mixture["router_bias_E"] + rate * jnp.sign(error_LE)
    layers = params["layers"] | {"mixture": mixture | {"router_bias_E": bias_LE}}
    return params | {"layers": layers}
