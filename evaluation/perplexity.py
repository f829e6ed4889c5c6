"""Loss, perplexity and bits per byte of held-out text, with a standard error."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from batiste.sharding import compiler_options, laid_out
from batiste.train import ObjectiveConfig, Program, ReplacedTerms, batch_loss


class Detection(NamedTuple):
    """Which tokens were replaced, as a discriminator says: nats per token, and the share of right
    answers beside that of always answering "original"."""

    loss: float
    accuracy: float
    always_original_accuracy: float


class Perplexity(NamedTuple):
    """What a model makes of a text; a discriminator's generator, beside which there is `detection`.

    loss: nats per token. bits_per_byte: of the UTF-8 text, with the standard error of this ratio
    over records (None for a single one). tokens, bytes: how many were predicted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    standard_error: float | None
    tokens: int
    bytes: int
    detection: Detection | None = None


class RowSums(NamedTuple):
    """Cross-entropy in nats, predicted tokens and their bytes of text, of each row; float32.

    Counts are exact up to 16 M per row. replaced: of a discriminator, None of others.
    """

    nats_B: jax.Array
    tokens_B: jax.Array
    bytes_B: jax.Array
    replaced: ReplacedTerms | None = None


def make_row_losses(
    program: Program, mesh: jax.sharding.Mesh, config: ObjectiveConfig
) -> Callable[[Any, Any, jax.Array], RowSums]:
    """Returns the jitted (params, batch, byte_lengths_V) -> RowSums, whole in every process.

    byte_lengths_V: float32, bytes of text that each token stands for.
    """
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    options = compiler_options(mesh.devices.flat[0], program.letters)

    @functools.partial(jax.jit, out_shardings=whole, compiler_options=options)
    def row_losses(params: Any, batch: Any, byte_lengths_V: jax.Array) -> RowSums:
        model = nnx.merge(program.graphdef, params)
        with laid_out(program.layout):
            terms = batch_loss(model, batch, None, config, None)
        bytes_BT = byte_lengths_V[batch.targets_BT] * batch.weights_BT
        return RowSums(terms.cross_entropy_B, batch.weights_BT.sum(axis=1), bytes_BT.sum(axis=1),
                       terms.replaced)

    def on_mesh(params: Any, batch: Any, byte_lengths_V: jax.Array) -> RowSums:
        with jax.set_mesh(mesh):
            return row_losses(params, batch, byte_lengths_V)

    return on_mesh


def perplexity(losses: Callable[[Any], RowSums], batches: Iterable[Any]) -> Perplexity:
    """Measures every token of `batches` once. Raises ValueError when they hold none."""
    sums = [jax.device_get(losses(batch)) for batch in batches]
    nats_R, tokens_R, bytes_R = (
        np.concatenate(rows).astype(np.float64) if rows else np.zeros(0)
        for rows in (zip(*(each[:3] for each in sums)) if sums else ((), (), ()))
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
    # Python's own numbers: a person who prints them is to see 3.5, and not np.float64(3.5).
    return Perplexity(
        float(loss), math.exp(min(loss, 700.0)), float(ratio), None if error is None else float(error),
        int(tokens_R.sum()), int(bytes_R.sum()),
        _detection([each.replaced for each in sums if each.replaced is not None]),
    )


def _detection(terms: list[ReplacedTerms]) -> Detection | None:
    """The means over all tokens of some batches."""
    if not terms:
        return None
    nats, tokens, replaced, right = (
        np.concatenate(rows).astype(np.float64).sum() for rows in zip(*terms))
    return Detection(
        float(nats / tokens), float(right / tokens), float(1 - replaced / tokens))
