"""Losses as (sum, denominator) pairs, so that they add up over micro-batches; nobody divides here."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from batiste.models import (
    Beside, LayerSums, LossRules, RouterSums, Rows, Transformer, token_losses, vocabulary_sums,
)
from batiste.sharding import constrain, in_time_order
from batiste.train.config import ObjectiveConfig
from batiste.train.replaced import (
    ReplacedTerms, check_generates, detection, filled,
)


class RouterTerms(NamedTuple):
    """Sums of a mixture of experts, float32; a row counts as much as it has tokens in the loss.

    balance, z: of all layers, times the row's tokens. load: tokens of each expert of each layer.
    """

    balance_B: jax.Array
    z_B: jax.Array
    load_BLE: jax.Array


class Terms(NamedTuple):
    """Sums over the tokens of each row, float32; of the loss over all rows.

    loss: what is minimized, label smoothing, z-loss and the router's losses included.
    cross_entropy: in nats. tokens: the sum of the loss weights, the denominator of both. real: how
    many of what the model reads are no padding; of two halves, of what the encoder reads.
    router: None without experts. replaced: None but of a discriminator, of which all else but the
    loss is the generator's. layers: what they sum up of each row, if they are measured.
    health: what train/health_statistics.py makes of all this.
    """

    loss: jax.Array
    cross_entropy_B: jax.Array
    tokens_B: jax.Array
    real_B: jax.Array
    router: RouterTerms | None = None
    replaced: ReplacedTerms | None = None
    layers: LayerSums | None = None
    health: Any = None

    def of_all_rows(self) -> "Terms":
        """The same summed over rows, which the names still say."""
        return Terms(self.loss, *jax.tree.map(lambda term: term.sum(axis=0), self[1:]))


def batch_loss(
    model: Transformer, batch, dropout_key, config: ObjectiveConfig, scale: jax.Array | None,
    measured: bool = False,
) -> Terms:
    """The loss of a Batch's targets by its weights, whatever objective made them.

    With `loss_chunk` or `fused`, never all logits at once.

    Each future head of the model adds its own loss, and nothing to the cross-entropy. scale: what
    the caller multiplies the loss by before differentiating it, or None. measured: whether the
    layers sum up what they do.
    """
    # Whole over `context`, so that each device takes what it needs of them and nothing is sent.
    beside = Beside(*(getattr(batch, name) for name in Beside._fields))
    beside = jax.tree.map(lambda x: constrain(x, "BS"[: x.ndim]), beside)
    batch = type(batch)(*(constrain(in_time_order(x_BT), "BS") for x_BT in batch[:5]))
    if model.config.discriminator:
        return _with_replaced(model, (batch, beside), dropout_key, config, measured)
    x_BTD, output = model.features(
        batch.tokens_BT, batch.positions_BT, batch.segments_BT, dropout_key, measured, beside
    )
    rows = Rows(x_BTD, batch.targets_BT, batch.weights_BT)
    terms = Terms(*_losses(model, rows, config, scale), batch.weights_BT.sum(axis=1),
                  _real(batch, beside))
    for index in range(model.config.future_heads):
        of_rows = batch.positions_BT, batch.segments_BT
        ahead_BTD = model.ahead(x_BTD, of_rows, index, dropout_key)
        rows = Rows(ahead_BTD, *later(batch, index + 1))
        terms = terms._replace(loss=terms.loss + _losses(model, rows, config, scale)[0])
    if output.router is not None:
        terms = _with_router(terms, output.router, config)
    return terms._replace(layers=output.sums)


def _with_replaced(
    model: Transformer, given: tuple, dropout_key, config: ObjectiveConfig, measured: bool
) -> Terms:
    """The generator's losses of hidden tokens, and the model's of which ones it replaced."""
    check_generates(model)
    batch, beside = given
    keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    rows = batch.positions_BT, batch.segments_BT
    logits_BTV = model.guesses(batch.tokens_BT, (*rows, beside.types_BT), keys[0])
    rules = LossRules(config.label_smoothing, config.z_loss)
    losses = token_losses(vocabulary_sums(logits_BTV, batch.targets_BT), rules)
    loss_B, cross_entropy_B = _of_rows(losses, batch.weights_BT)
    filled_BT = filled(logits_BTV, batch)
    x_BTD, output = model.features(filled_BT, *rows, keys[1], measured, beside)
    detection_B, replaced = detection(model.replaced_odds(x_BTD), filled_BT, batch)
    return Terms(
        (loss_B + detection_B).sum(axis=0), cross_entropy_B, batch.weights_BT.sum(axis=1),
        _real(batch, beside), replaced=replaced, layers=output.sums)


def _real(batch: Any, beside: Beside) -> jax.Array:
    """How many tokens of each row are no padding."""
    source = beside.source_segments_BS
    segments = batch.segments_BT if source is None else source
    return (segments != 0).astype(jnp.float32).sum(axis=1)


def _losses(
    model: Transformer, rows: Rows, config: ObjectiveConfig, scale: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The sum of the weighted losses, and each row's sum of weighted cross-entropies."""
    rules = LossRules(config.label_smoothing, config.z_loss)
    if config.fused:
        losses = model.fused_losses(rows.x_BTD, rows.targets_BT, rules)
    elif config.loss_chunk is not None:
        return model.chunked_loss(rows, scale, rules, config.loss_chunk)
    else:
        losses = token_losses(vocabulary_sums(model.logits(rows.x_BTD), rows.targets_BT), rules)
    loss_B, cross_entropy_B = _of_rows(losses, rows.weights_BT)
    return loss_B.sum(axis=0), cross_entropy_B


def _of_rows(losses: tuple, weights_BT: jax.Array) -> tuple[jax.Array, ...]:
    """The weighted sums of each row."""
    return tuple((x_BT * weights_BT).sum(axis=1) for x_BT in losses)


def later(batch: Any, count: int) -> tuple[jax.Array, jax.Array]:
    """Targets and weights `count` tokens later; weight 0 where the document is over by then.

    Only of rows whose documents are in one piece each, in order.
    """
    length = batch.targets_BT.shape[1]

    def shifted(x_BT: jax.Array) -> jax.Array:
        return jnp.pad(x_BT, ((0, 0), (0, count)))[:, count:][:, :length]

    same_BT = shifted(batch.segments_BT) == batch.segments_BT
    return shifted(batch.targets_BT), jnp.where(same_BT, shifted(batch.weights_BT), 0)


def _with_router(terms: Terms, router: RouterSums, config: ObjectiveConfig) -> Terms:
    """Adds the losses of all layers' routers to each row's, in proportion to the row's tokens."""
    summed = RouterTerms(
        terms.tokens_B * router.balance_B.sum(axis=0),
        terms.tokens_B * router.z_B.sum(axis=0),
        router.load_BE.swapaxes(0, 1),
    )
    extra_B = config.balance_loss * summed.balance_B + config.router_z_loss * summed.z_B
    return terms._replace(loss=terms.loss + extra_B.sum(axis=0), router=summed)
