"""Laws and golden curves of the learning-rate schedules."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste.train.schedule import KINDS, ScheduleConfig, make_schedule

PEAK, WARMUP, FINAL, TOTAL = 0.02, 7, 0.1, 60
EXTRA = {"step": {"step_every": 9, "step_factor": 0.5}, "warmup_stable_decay": {"decay_steps": 13}}
REACHES_FINAL = ("linear", "cosine", "exponential", "warmup_stable_decay")


def config(kind, **fields):
    return ScheduleConfig(**{"kind": kind, "learning_rate": PEAK, "warmup_steps": WARMUP,
                             "final_fraction": FINAL, **EXTRA.get(kind, {}), **fields})


def curve(kind, total_steps=TOTAL, **fields):
    schedule = jax.jit(make_schedule(config(kind, **fields), total_steps))
    return np.array([schedule(jnp.int32(step)) for step in range(total_steps)])


def expected(kind, step):
    """The curve in plain Python, by update number n = step + 1."""
    n, after = step + 1, step + 1 - WARMUP
    if n < WARMUP:
        return PEAK * n / WARMUP
    progress = after / (TOTAL - WARMUP)
    start_of_decay = TOTAL - 13
    return PEAK * {
        "constant": 1.0,
        "linear": 1 - (1 - FINAL) * progress,
        "cosine": FINAL + (1 - FINAL) * (1 + math.cos(math.pi * progress)) / 2,
        "inverse_sqrt": math.sqrt(WARMUP / n),
        "step": 0.5 ** (after // 9),
        "exponential": FINAL**progress,
        "warmup_stable_decay": 1 - (1 - FINAL) * max(0, n - start_of_decay) / 13,
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_follows_the_formula(kind):
    np.testing.assert_allclose(
        curve(kind), [expected(kind, step) for step in range(TOTAL)], rtol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", ["linear", "exponential"])
def test_the_rate_starts_above_zero_peaks_where_the_warmup_ends_and_never_jumps(kind, warmup):
    rates = curve(kind, warmup=warmup)
    assert rates[0] == pytest.approx(PEAK / WARMUP)
    assert rates.argmax() == WARMUP - 1 and rates.max() == pytest.approx(PEAK)
    assert (np.diff(rates[:WARMUP]) > 0).all() and (np.diff(rates[WARMUP:]) <= 0).all()
    if kind != "step":
        assert np.abs(np.diff(rates[WARMUP - 1:])).max() < PEAK / 10


def test_the_exponential_warmup_is_geometric():
    ratios = np.exp(np.diff(np.log(curve("constant", warmup="exponential")[:WARMUP])))
    np.testing.assert_allclose(ratios, WARMUP ** (1 / (WARMUP - 1)), rtol=1e-5)


@pytest.mark.parametrize("kind", REACHES_FINAL)
@pytest.mark.parametrize("warmup_steps", [0, 1, 2, WARMUP])
def test_the_last_update_has_the_final_rate_and_no_earlier_one_does(kind, warmup_steps):
    rates = curve(kind, warmup_steps=warmup_steps)
    assert rates[-1] == pytest.approx(PEAK * FINAL, rel=1e-5)
    assert rates[-2] > PEAK * FINAL * 1.0001
    assert rates[max(warmup_steps - 1, 0)] == pytest.approx(PEAK)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"warmup_stable_decay"}))
def test_a_run_of_one_step_trains_at_the_peak(kind):
    np.testing.assert_allclose(curve(kind, total_steps=1, warmup_steps=0), [PEAK])


@pytest.mark.parametrize(("fields", "message"), [
    ({"kind": "cosin"}, r"train\.schedule\.kind.*'cosin'.*did you mean 'cosine'"),
    ({"warmup": "liner"}, r"train\.schedule\.warmup.*did you mean 'linear'"),
    ({"learning_rate": 0.0}, r"train\.schedule\.learning_rate.*> 0"),
    ({"learning_rate": math.nan}, r"train\.schedule\.learning_rate.*nan"),
    ({"warmup_steps": -1}, r"train\.schedule\.warmup_steps.*-1"),
    ({"warmup_steps": TOTAL + 1}, rf"train\.schedule\.warmup_steps.*{TOTAL} steps"),
    ({"final_fraction": 1.5}, r"train\.schedule\.final_fraction.*1\.5"),
    ({"kind": "exponential", "final_fraction": 0.0}, r"train\.schedule\.final_fraction.*linear"),
    ({"decay_steps": 5}, r"train\.schedule\.decay_steps.*None.*warmup_stable_decay"),
    ({"kind": "warmup_stable_decay"}, r"train\.schedule\.decay_steps.*None"),
    ({"kind": "warmup_stable_decay", "decay_steps": 54}, r"train\.schedule\.decay_steps.*53"),
    ({"kind": "step", "step_every": 3}, r"train\.schedule\.step_factor"),
])
def test_a_wrong_field_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message) as refusal:
        make_schedule(ScheduleConfig(**{"warmup_steps": WARMUP, **fields}), TOTAL)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["linear", "cosine", "warmup_stable_decay"])
def test_no_rate_of_a_run_that_ends_at_zero_is_below_it(kind):
    for total, peak in ((37, 3e-4), (50, 1e-3), (61, 0.02), (100, 7e-4)):
        schedule = make_schedule(config(kind, final_fraction=0, learning_rate=peak), total)
        rates = np.asarray(jax.vmap(schedule)(jnp.arange(total + 3)))
        assert rates[:total].min() >= 0 and rates[total - 2] > 0, (kind, total, peak)
        np.testing.assert_allclose(rates[total - 1:], 0, atol=1e-6 * peak)
