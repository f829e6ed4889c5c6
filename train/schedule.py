"""Learning-rate schedules: a warm-up to the peak, then one of seven shapes.

Step t is the t-th update counted from 0, so a run of `total_steps` uses steps 0 … total_steps − 1.
Both ends are placed on steps that are really taken: the first update already moves (the warm-up
starts at peak / warmup_steps, not at 0, which would spend a whole batch on a null update), the peak
is step warmup_steps − 1, and the final value is the rate of the last update.
"""

import dataclasses
import difflib
from collections.abc import Sequence

import jax.numpy as jnp
import optax

from batiste.fields import Config, check_types

KINDS = (
    "constant", "linear", "cosine", "inverse_sqrt", "step", "exponential", "warmup_stable_decay",
)
WARMUPS = ("linear", "exponential")
# The fields that only one kind reads: required there, refused (not ignored) elsewhere.
KIND_OF_FIELD = {
    "decay_steps": "warmup_stable_decay", "step_every": "step", "step_factor": "step",
}
DURATIONS = ("warmup_steps", "decay_steps", "step_every")


def check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    """Raises a ValueError that names `field` and the nearest of `choices` if `value` is not one."""
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{field}: expected one of {', '.join(choices)}, got {value!r}{hint}")


@dataclasses.dataclass
class ScheduleConfig(Config):
    """The learning rate over a run.

    A duration is a whole number of steps, or a fraction below 1 of the run's steps, which
    `in_steps` rounds to whole ones.
    `final_fraction` is read by linear, cosine, exponential and warmup_stable_decay, all of which
    reach it at the last step of the run.
    """

    # constant, linear, cosine, inverse_sqrt, step, exponential or warmup_stable_decay
    kind: str = "cosine"
    learning_rate: float = 1e-3  # at the peak, where the warm-up ends
    warmup: str = "linear"  # linear or exponential (a straight line in log rate)
    warmup_steps: int | float = 0.1  # up to the peak: steps, or a fraction of the run below 1
    final_fraction: float = 0.1  # rate of the last step / peak
    # warmup_stable_decay: the final linear decay, in steps or as a fraction of the run below 1
    decay_steps: int | float | None = None
    # step: between two drops, in steps or as a fraction of the run below 1
    step_every: int | float | None = None
    step_factor: float | None = None  # step: what one drop multiplies the rate by

    def validate(self) -> None:
        """Raises ValueError, naming the field, if the fields do not describe a schedule."""
        check_types(self, "train.schedule.")
        check_choice("train.schedule.kind", self.kind, KINDS)
        check_choice("train.schedule.warmup", self.warmup, WARMUPS)
        if not 0 < self.learning_rate:
            raise ValueError(
                f"train.schedule.learning_rate: expected a number > 0, got {self.learning_rate}")
        if self.warmup_steps < 0:
            raise ValueError(
                f"train.schedule.warmup_steps: expected >= 0, got {self.warmup_steps}")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError("train.schedule.final_fraction: expected a fraction of the peak in "
                             f"[0, 1], got {self.final_fraction}")
        if self.kind == "exponential" and self.final_fraction == 0:
            raise ValueError("train.schedule.final_fraction: expected > 0, got 0; an exponential "
                             "never reaches 0: give a small fraction or set kind to linear")
        self._validate_fields_of_one_kind()
        for field in DURATIONS:
            value = getattr(self, field)
            if isinstance(value, float) and value >= 1:
                raise ValueError(f"train.schedule.{field}: expected a whole number of steps, or a "
                                 f"fraction of the run below 1, got {value}")

    def _validate_fields_of_one_kind(self) -> None:
        for field, kind in KIND_OF_FIELD.items():
            value = getattr(self, field)
            if self.kind == kind and (value is None or value <= 0):
                raise ValueError(f"train.schedule.{field}: expected a number > 0 for kind "
                                 f"{kind}, got {value}")
            if self.kind != kind and value is not None:
                raise ValueError(f"train.schedule.{field}: expected None, got {value}; only kind "
                                 f"{kind} reads it and kind is {self.kind}")


def in_steps(duration: int | float, total_steps: int) -> int:
    """A duration in whole steps: a float is a fraction of the run, of which more than 0 is a step."""
    if isinstance(duration, int):
        return duration
    return max(round(duration * total_steps), int(duration > 0))


def make_schedule(config: ScheduleConfig, total_steps: int) -> optax.Schedule:
    """Returns the function from a step (0-based update count) to the learning rate.

    Raises:
        ValueError: a field is wrong, or the warm-up or decay does not fit in `total_steps`.
    """
    config.validate()
    config = dataclasses.replace(config, **{
        field: in_steps(value, total_steps) for field in DURATIONS
        if (value := getattr(config, field)) is not None})
    if not config.warmup_steps <= total_steps:
        raise ValueError(f"train.schedule.warmup_steps: expected at most the run's {total_steps} "
                         f"steps, got {config.warmup_steps}; a fraction such as 0.1 always fits")
    peak_step = max(config.warmup_steps - 1, 0)
    curve = _decay(config, total_steps - 1 - peak_step)
    if peak_step > 0:
        curve = optax.join_schedules([_warmup(config, peak_step), curve], [peak_step])
    # Optax mixes the step with floats, which strict dtype promotion refuses for an integer. What
    # ends at 0 must not end at -1e-11, as rounding would have it.
    return lambda step: jnp.maximum(
        jnp.asarray(curve(jnp.asarray(step, jnp.float32)), jnp.float32), 0.0)


def _warmup(config: ScheduleConfig, peak_step: int) -> optax.Schedule:
    """From peak / warmup_steps at step 0 to the peak at `peak_step`."""
    peak, first = config.learning_rate, config.learning_rate / config.warmup_steps
    if config.warmup == "exponential":
        return optax.exponential_decay(first, peak_step, decay_rate=peak / first)
    return optax.linear_schedule(first, peak, peak_step)


def _decay(config: ScheduleConfig, remaining: int) -> optax.Schedule:
    """From the peak at its step 0; the last update of the run is its step `remaining`."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    if config.kind == "inverse_sqrt":
        # Vaswani et al. 2017 (arXiv:1706.03762), eq. 3, scaled to pass through the peak. Optax has
        # no such schedule.
        warmup = max(config.warmup_steps, 1)
        return lambda step: peak * jnp.sqrt(warmup / (step + warmup))
    if config.kind == "step":
        return optax.exponential_decay(
            peak, config.step_every, config.step_factor, staircase=True)
    if config.kind == "warmup_stable_decay":
        # Hu et al. 2024, MiniCPM (arXiv:2404.06395): hold the peak, decay at the very end.
        if config.decay_steps > remaining:
            raise ValueError(f"train.schedule.decay_steps: expected at most the {remaining} steps "
                             f"after the warm-up, got {config.decay_steps}")
        begin = remaining - config.decay_steps
        return optax.linear_schedule(peak, final, config.decay_steps, transition_begin=begin)
    if config.kind == "constant" or remaining == 0:
        return optax.constant_schedule(peak)
    if config.kind == "linear":
        return optax.linear_schedule(peak, final, remaining)
    if config.kind == "exponential":
        return optax.exponential_decay(peak, remaining, config.final_fraction, end_value=final)
    return optax.cosine_decay_schedule(peak, remaining, alpha=config.final_fraction)
