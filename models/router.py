"""Which experts a token goes to, with what weights, and what the losses of the router need."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from batiste.models.config import TransformerConfig
from batiste.sharding import constrain, per_device, spec


class RouterSums(NamedTuple):
    """What a layer's router did in each row, over the row's real tokens, float32.

    balance_B: the balance loss of the row, 1 when all experts are equally likely and loaded.
    z_B: mean square of the logarithm of the normalizer. load_BE: tokens that chose each expert.
    """

    balance_B: jax.Array
    z_B: jax.Array
    load_BE: jax.Array


def route(
    x_BTD: jax.Array,
    router_DE: jax.Array,
    bias_E: jax.Array | None,
    real_BT: jax.Array,
    config: TransformerConfig,
    *,
    between_blocks: bool,
) -> tuple[jax.Array, jax.Array, RouterSums]:
    """Returns chosen_BTC (int32), weights_BTC (float32), and sums over tokens where real_BT is 1.

    Scores are a softmax or sigmoids, in fp32. The largest are chosen, after bias_E has been added
    (arXiv:2408.15664); the weights are the chosen scores without it, made to sum to 1: what Mixtral
    (arXiv:2401.04088), DeepSeek-V3 (arXiv:2412.19437) and Qwen3 do, times `routed_scale`. One expert a token gets its
    score itself as in Switch (arXiv:2101.03961): a weight of 1 would teach the router nothing.
    between_blocks: how x_BTD lies on the mesh; no layout costs communication.
    """
    # HIGHEST, for a TPU rounds the operands of an fp32 product to bf16 otherwise.
    logits_BTE = jnp.einsum(
        "btd,de->bte", x_BTD.astype(jnp.float32), constrain(router_DE, ""),
        precision=jax.lax.Precision.HIGHEST,
    )
    softmax = config.expert_scores == "softmax"
    scores_BTE = jax.nn.softmax(logits_BTE) if softmax else jax.nn.sigmoid(logits_BTE)
    preference_BTE = jax.lax.stop_gradient(scores_BTE)
    if bias_E is not None:
        preference_BTE += jax.lax.stop_gradient(constrain(bias_E, ""))[None, None]
    rows = spec("BT", between_blocks=between_blocks)
    C, E = config.experts_per_token, router_DE.shape[1]

    def choose(preference_BTE: jax.Array) -> jax.Array:
        return jax.lax.top_k(_in_best_groups(preference_BTE, config), C)[1]

    chosen_BTC = per_device(choose, (rows,), rows)(preference_BTE)
    hit_BTCE = jax.nn.one_hot(chosen_BTC, E, dtype=jnp.float32)
    weights_BTC = (hit_BTCE * scores_BTE[:, :, None]).sum(axis=-1)
    if C > 1:
        weights_BTC /= weights_BTC.sum(axis=-1, keepdims=True)
    weights_BTC *= config.routed_scale
    if not softmax:
        scores_BTE /= scores_BTE.sum(axis=-1, keepdims=True)
    sums = _sums(logits_BTE, scores_BTE, hit_BTCE, real_BT)
    return chosen_BTC, weights_BTC, sums


def _in_best_groups(preference_BTE: jax.Array, config: TransformerConfig) -> jax.Array:
    """The same, and minus infinity outside of the groups that a token takes its experts from.

    A group is as good as its best two together (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    """
    groups = config.expert_groups
    if groups == 1:
        return preference_BTE
    split = preference_BTE.reshape(*preference_BTE.shape[:2], groups, -1)
    best = jax.lax.top_k(jax.lax.top_k(split, 2)[0].sum(axis=-1), config.groups_per_token)[1]
    taken = jax.nn.one_hot(best, groups, dtype=jnp.int32).sum(axis=2) > 0
    return jnp.where(taken[..., None], split, -jnp.inf).reshape(preference_BTE.shape)


def _sums(logits_BTE, shares_BTE, hit_BTCE, real_BT) -> RouterSums:
    """The sequence-wise balance loss, sum of f_i P_i (arXiv:2412.19437, equations 17 to 20), and
    the router z-loss (ST-MoE, arXiv:2202.08906, equation 5), without their factors."""
    tokens_B = jnp.maximum(real_BT.sum(axis=1), 1)
    load_BE = constrain((hit_BTCE * real_BT[..., None, None]).sum(axis=(1, 2)), "B")
    share_BE = (shares_BTE * real_BT[..., None]).sum(axis=1) / tokens_B[:, None]
    C, E = hit_BTCE.shape[2:]
    frequency_BE = load_BE * E / (C * tokens_B[:, None])
    z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
    z_B = (z_BT * real_BT).sum(axis=1) / tokens_B
    return RouterSums(
        constrain((frequency_BE * share_BE).sum(axis=1), "B"), constrain(z_B, "B"), load_BE
    )
