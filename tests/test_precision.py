"""Laws of dynamic loss scaling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste.train.optimizer import OptimizerConfig, make_optimizer
from batiste.train.precision import (LossScale, LossScaleConfig, adjust, all_finite,
                                     initial_loss_scale, keep_if, unscale)

CONFIG = LossScaleConfig(initial=2.0**10, growth_interval=3, minimum=2.0**8, maximum=2.0**12)


def run(overflow_at, steps, config=CONFIG):
    """Fits y = w·x + b in float16; at the steps of `overflow_at` the input overflows."""
    x_BD = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float16)
    y_B = x_BD @ np.array([0.5, -1.0, 0.25], np.float16)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.0), lambda step: 0.05, ("D", ""))

    def loss(params, x_BD, scale):
        w_D, b = (p.astype(jnp.float16) for p in params)
        error_B = x_BD @ w_D + b - y_B
        return jnp.mean(jnp.square(error_B.astype(jnp.float32))) * scale

    @jax.jit
    def step(params, state, loss_scale, x_BD):
        scaled = jax.grad(loss)(params, x_BD, loss_scale.scale)
        finite = all_finite(scaled)
        updates, new_state = optimizer.update(unscale(scaled, loss_scale), state, params)
        new = keep_if(finite, (optax.apply_updates(params, updates), new_state), (params, state))
        return *new, adjust(loss_scale, finite, config)

    params = (jnp.zeros(3), jnp.zeros(()))
    carry = (params, optimizer.init(params), initial_loss_scale(config))
    history = [carry]
    for index in range(steps):
        carry = step(*carry, np.full_like(x_BD, 6e4) if index in overflow_at else x_BD)
        history.append(carry)
    return history, float(loss(carry[0], x_BD, 1.0))


def test_an_overflowing_step_changes_nothing_but_the_scale():
    history, _ = run({2}, 4)
    before, after = history[2], history[3]
    assert float(after[2].scale) == float(before[2].scale) / 2
    assert int(after[2].good_steps) == 0
    jax.tree.map(np.testing.assert_array_equal, before[:2], after[:2])


def test_training_survives_overflows():
    _, loss = run({0, 5, 6, 40}, 120)
    assert loss < 1e-3


def test_dropping_overflows_equals_never_having_seen_them():
    # 2**10 and its neighbours are exact factors, so the two runs agree bit for bit.
    injected, clean = run({1, 4}, 8)[0][-1], run(set(), 6)[0][-1]
    jax.tree.map(np.testing.assert_array_equal, injected[:2], clean[:2])


@pytest.mark.parametrize("scale", [1.0, 2.0**7, 2.0**15])
def test_unscaled_gradients_do_not_depend_on_the_scale(scale):
    x_BD = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)

    def gradient(scale):
        return jax.grad(lambda w_D: jnp.sum(jnp.tanh(x_BD @ w_D)) * scale)(jnp.ones(4) / 3)

    unscaled = unscale(gradient(scale), LossScale(jnp.float32(scale), jnp.int32(0)))
    np.testing.assert_allclose(unscaled, gradient(1.0), rtol=1e-6)


def test_unscale_returns_float32_beyond_the_range_of_float16():
    tiny = unscale(jnp.full((2,), 6e-5, jnp.float16), LossScale(jnp.float32(2**15), jnp.int32(0)))
    assert tiny.dtype == jnp.float32
    np.testing.assert_allclose(tiny, np.float16(6e-5).astype(np.float32) / 2**15)


def test_the_scale_doubles_after_a_run_of_good_steps_and_stays_in_its_bounds():
    def exponents(overflow_at, steps):
        return [int(np.log2(carry[2].scale)) for carry in run(overflow_at, steps)[0]]

    grown = [10] * 3 + [11] * 3 + [12]  # every third good step
    assert exponents(set(), 12) == grown + [12] * 6
    assert exponents({6, 8, 9, 10, 11}, 13) == grown + [11, 11, 10, 9, 8, 8, 8]


def test_a_single_overflow_restarts_the_count_of_good_steps():
    scales = [float(carry[2].scale) for carry in run({2}, 6)[0]]
    assert scales == [2**10, 2**10, 2**10, 2**9, 2**9, 2**9, 2**10]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_one_bad_element_in_any_leaf_is_seen(bad):
    tree = {"a": np.ones((2, 3), np.float32), "b": (np.ones(4, np.float16),)}
    assert bool(all_finite(tree)) and bool(all_finite(()))
    for leaf in jax.tree.leaves(tree):
        leaf.flat[-1] = bad
        assert not bool(all_finite(tree))
        leaf.flat[-1] = 1


@pytest.mark.parametrize(("fields", "name"), [
    ({"initial": 1000.0}, "initial"), ({"initial": 2.0**30}, "initial"),
    ({"minimum": 0.0}, "minimum"), ({"maximum": float("inf")}, "maximum"),
    ({"growth_interval": 0}, "growth_interval"),
])
def test_a_wrong_field_is_refused_by_name(fields, name):
    with pytest.raises(ValueError, match=rf"train\.loss_scale\.{name}(=inf)?: expected"):
        LossScaleConfig(**fields).validate()
