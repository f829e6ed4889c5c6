"""The loss of a language model's head, without its logits: from features to losses."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from batiste.pallas_kernels import gpu_cross_entropy, tpu_cross_entropy
from batiste.pallas_kernels.cross_entropy_operands import Operands, Options, Sums


class Certified(NamedTuple):
    """What the tests hold to the reference and compile; D and V at most the sizes given."""

    chip: str
    dtypes: tuple[str, ...]
    layouts: tuple[str, ...]
    features: tuple[str, ...]
    model_dim: int
    vocabulary: int


CERTIFIED = tuple(
    Certified(
        chip,
        dtypes=("bfloat16", "float16", "float32"),
        layouts=("DV", "VD"),
        features=("soft_cap", "z_loss", "label_smoothing"),
        model_dim=8192,
        vocabulary=262144,
    )
    for chip in ("v5e", "v5p", "v6e", "tpu7x", "hopper", "ampere")
)


def fused_cross_entropy(
    x_MD: jax.Array,
    head: jax.Array,
    targets_M: jax.Array,
    *,
    layout: str,
    soft_cap: float | None,
    z_loss: float,
    label_smoothing: float,
    chip: str,
    interpret: object = False,
) -> tuple[jax.Array, jax.Array]:
    """Loss and cross-entropy of each token in nats, both float32 M; differentiable in x and head.

    The logits exist tile by tile only, forward and backward (Cut Cross-Entropy, arXiv:2411.09009).

    x_MD: features after the last norm; they give the dtype of the products, which accumulate in
        fp32. head: DV or VD, as `layout` says, in x's dtype or a wider one, which its gradient
        has: that is not rounded to x's dtype. targets_M: int32 in [0, V).
    soft_cap, z_loss, label_smoothing: as in `train.objectives`; the loss includes the last two.
    interpret: passed to `pallas_call`; for tests on a CPU.
    Raises ValueError for what `CERTIFIED` does not list.
    """
    _check(x_MD, head, layout, chip)
    padding = -x_MD.shape[1] % 128
    x_MD = jnp.pad(x_MD, ((0, 0), (0, padding)))
    head = jnp.pad(head, [(0, padding if letter == "D" else 0) for letter in layout])
    options = Options(layout, soft_cap, label_smoothing != 0, chip, interpret)
    sums = _sums(options, x_MD, head, targets_M)
    return _losses(sums, head.shape[layout.index("V")], z_loss, label_smoothing)


def reference_cross_entropy(
    x_MD: jax.Array,
    head: jax.Array,
    targets_M: jax.Array,
    *,
    layout: str,
    soft_cap: float | None,
    z_loss: float,
    label_smoothing: float,
) -> tuple[jax.Array, jax.Array]:
    """What `fused_cross_entropy` computes, from all logits at once."""
    dims = (((1,), (layout.index("D"),)), ((), ()))
    logits_MV = jax.lax.dot_general(
        x_MD, head.astype(x_MD.dtype), dims, preferred_element_type=jnp.float32
    )
    if soft_cap is not None:
        logits_MV = soft_cap * jnp.tanh(logits_MV / soft_cap)
    hit_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=1)[:, 0]
    sums = Sums(jax.nn.logsumexp(logits_MV, axis=1), hit_M, logits_MV.sum(axis=1))
    return _losses(sums, logits_MV.shape[1], z_loss, label_smoothing)


def _losses(sums: Sums, vocabulary: int, z_loss: float, label_smoothing: float):
    cross_entropy_M = sums.log_z_M - sums.hit_M
    loss_M = cross_entropy_M
    if label_smoothing:
        uniform_M = sums.log_z_M - sums.total_M / vocabulary
        loss_M = (1 - label_smoothing) * loss_M + label_smoothing * uniform_M
    if z_loss:
        loss_M += z_loss * jnp.square(sums.log_z_M)
    return loss_M, cross_entropy_M


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(options: Options, x_MD: jax.Array, head: jax.Array, targets_M: jax.Array) -> Sums:
    return _kernels(options).forward(options, Operands(x_MD, head.astype(x_MD.dtype), targets_M))


def _sums_forward(options, x_MD, head, targets_M):
    sums = _sums(options, x_MD, head, targets_M)
    return sums, (x_MD, head, targets_M, sums.log_z_M)


def _sums_backward(options, saved, gradients):
    x_MD, head, targets_M, log_z_M = saved
    operands = Operands(x_MD, head.astype(x_MD.dtype), targets_M)
    backward = _kernels(options).backward
    return *backward(options, operands, log_z_M, gradients, head.dtype), None


_sums.defvjp(_sums_forward, _sums_backward)


def _kernels(options: Options):
    """The module with `forward` and `backward` for the chip."""
    return gpu_cross_entropy if options.chip in ("hopper", "ampere") else tpu_cross_entropy


def _check(x_MD: jax.Array, head: jax.Array, layout: str, chip: str) -> None:
    chips = {entry.chip: entry for entry in CERTIFIED}
    if chip not in chips:
        raise ValueError(f"fused_cross_entropy on {chip!r}: certified are {', '.join(chips)}")
    entry = chips[chip]
    if layout not in entry.layouts:
        raise ValueError(f"layout={layout!r}: certified are {' and '.join(entry.layouts)}")
    if x_MD.dtype.name not in entry.dtypes:
        raise ValueError(f"x_MD in {x_MD.dtype}: certified are {', '.join(entry.dtypes)}")
    D, V = (head.shape[layout.index(letter)] for letter in "DV")
    if D != x_MD.shape[1]:
        raise ValueError(f"x_MD has D={x_MD.shape[1]}, the head in layout {layout} has D={D}")
    limits = (("model dim", D, entry.model_dim), ("vocabulary", V, entry.vocabulary))
    for name, size, most in limits:
        if size > most:
            raise ValueError(f"{name} {size} on {chip}: certified up to {most}")
