"""Loss, perplexity and bits per byte of held-out text, with a standard error."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from batiste.sharding import compiler_options, laid_out
from batiste.train import ObjectiveConfig, Program, causal_loss


class Perplexity(NamedTuple):
    """What a model makes of a text.

    loss: nats per token. bits_per_byte: of the UTF-8 text, with the standard error of this ratio
    over records (None for a single one). tokens, bytes: how many were predicted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    standard_error: float | None
    tokens: int
    bytes: int


def make_row_losses(
    program: Program, mesh: jax.sharding.Mesh, config: ObjectiveConfig
) -> Callable:
    """Returns the jitted (params, batch) -> cross-entropy of each row in nats, float32 B."""

    options = compiler_options(mesh.devices.flat[0], program.letters)

    @functools.partial(jax.jit, compiler_options=options)
    def row_losses(params: Any, batch: Any) -> jax.Array:
        model = nnx.merge(program.graphdef, params)
        with laid_out(program.layout):
            return causal_loss(model, batch, None, config).cross_entropy_B

    def on_mesh(params: Any, batch: Any) -> jax.Array:
        with jax.set_mesh(mesh):
            return row_losses(params, batch)

    return on_mesh


def perplexity(
    losses: Callable[[Any], jax.Array],
    batches: Iterable[Any],
    place: Callable[[Any], Any],
    byte_lengths_V: np.ndarray,
) -> Perplexity:
    """Measures every token of `batches` once.

    losses: placed batch -> nats of each row. batches: Batches of NumPy arrays. place: puts one on
    the devices. byte_lengths_V: bytes of text that each token stands for.
    Raises ValueError when the batches hold no token.
    """
    nats, tokens, num_bytes = [], [], []
    for batch in batches:
        pending = losses(place(batch))
        tokens.append(batch.weights_BT.sum(axis=1))
        num_bytes.append((byte_lengths_V[batch.targets_BT] * batch.weights_BT).sum(axis=1))
        nats.append(np.asarray(jax.device_get(pending), np.float64))
    tokens_R, bytes_R, nats_R = (
        np.concatenate(rows).astype(np.float64) if rows else np.zeros(0)
        for rows in (tokens, num_bytes, nats)
    )
    if tokens_R.sum() == 0 or bytes_R.sum() == 0:
        raise ValueError(
            "the validation split holds no text: raise data.validation_fraction or add documents"
        )
    loss = nats_R.sum() / tokens_R.sum()
    bits_R = nats_R / math.log(2)
    ratio = bits_R.sum() / bytes_R.sum()
    rows = int((tokens_R > 0).sum())
    error = None
    if rows > 1:
        # Standard error of a ratio of sums over records (Cochran 1977, Sampling Techniques, 2.11).
        residuals_R = bits_R - ratio * bytes_R
        error = math.sqrt(rows / (rows - 1) * np.square(residuals_R).sum()) / bytes_R.sum()
    return Perplexity(
        loss, math.exp(min(loss, 700.0)), ratio, error, int(tokens_R.sum()), int(bytes_R.sum())
    )
