"""The training loop: dispatch a step, then look at the one before."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from batiste.train.checkpoint import Checkpoints
from batiste.train.config import TrainConfig
from batiste.train.finished import out_of_patience
from batiste.train.ledger import Ledger
from batiste.train.metrics import MetricsWriter
from batiste.train.progress import Progress
from batiste.train.monitor import Monitor
from batiste.train.replicas import Replicas
from batiste.train.state import TrainState
from batiste.train.stopping import stop_requests


@dataclasses.dataclass
class Run:
    """What the loop drives.

    batches: Batches on the mesh, the one of step `state.step` first. evaluate: what a state makes of
    the validation split, by name; "loss" in nats per token. last_step: where the run ends, by its
    steps or its FLOP budget. sample: writes down what a state makes of the prompts, after each
    evaluation but the last; None writes none.
    """

    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    batches: Iterator[Any]
    evaluate: Callable[[TrainState], dict[str, float]]
    last_step: int
    sample: Callable[[TrainState, int], None] | None = None


@dataclasses.dataclass
class Records:
    """Where a run writes. `meta` is saved with every checkpoint; its "validation" list grows.

    monitor: None where steps do not measure their health. replicas: None where nobody compares them.
    """

    checkpoints: Checkpoints
    metrics: MetricsWriter
    progress: Progress
    ledger: Ledger
    meta: dict[str, Any]
    monitor: Monitor | None = None
    replicas: Replicas | None = None


def fit(
    config: TrainConfig, state: TrainState, run: Run, records: Records
) -> tuple[TrainState, str]:
    """Trains from `state` to `run.last_step`; returns the state and why it stopped.

    The reason is "done", "patience", or the signal that asked for it ("SIGINT", "SIGTERM"); in
    every case the state is saved and committed. All processes of a run call this alike. Raises
    ValueError when the loss is not finite, or as the monitor does, which may also raise RollBack.
    """
    pending = None
    reason, ledger = "done", records.ledger
    step = first = int(jax.device_get(state.step))
    last_step = run.last_step
    if out_of_patience(records.meta["validation"], config.stop.patience):
        reason, last_step = "patience", first
    with stop_requests() as stop_request, jax.transfer_guard("disallow"):
        for step in range(first + 1, last_step + 1):
            ledger.enter("data wait")
            batch = next(run.batches)
            # While the device was still at the step before, nothing has waited for the data.
            waited = pending is None or pending[1]["loss"].is_ready()
            ledger.enter("compilation" if step == first + 1 else "step",
                         was="data wait" if waited else "step")
            state, metrics = run.train_step(state, batch)
            ledger.enter("step")
            if pending is not None:
                _record(records, *pending)
            pending = (step, metrics)

            asked = stop_request()
            last = step == last_step or asked is not None
            evaluation_due = step % config.evaluation.every == 0 or step == last_step
            save_due = step % config.checkpoint.every == 0 or records.checkpoints.failed(step)
            checks = records.replicas is not None
            if checks and (last or save_due or records.replicas.due(step)):
                state = records.replicas.check(step, state)
            if not (last or evaluation_due or save_due):
                continue
            _record(records, *pending)
            pending = None
            if evaluation_due:
                ledger.enter("evaluation")
                measured = run.evaluate(state)
                records.metrics.write(step, "validation", **measured)
                loss = measured["loss"]
                records.progress.note(f"step {step:,}  validation loss {loss:.4f}")
                records.meta["validation"].append([step, loss])
                if records.monitor is not None:
                    records.monitor.validated(step, loss)
                if out_of_patience(records.meta["validation"], config.stop.patience):
                    reason, last = "patience", True
                if run.sample is not None and not last:
                    ledger.enter("sampling")
                    run.sample(state, step)
            if last or save_due:
                state = records.replicas.check(step, state) if checks else state
                ledger.enter("save blocked")
                records.checkpoints.save(step, state, records.meta)
            if last:
                reason = asked or stop_request() or reason
                break
        ledger.enter("save blocked")
        records.checkpoints.finish(step, state, records.meta)
        ledger.enter("idle")
    records.progress.close()
    return state, reason


def _record(records: Records, step: int, metrics: dict[str, jax.Array]) -> None:
    """Fetches the metrics of a step (waiting for it) and writes them down."""
    # What each slice measures by itself never travels: a process reports the mean of what it sees.
    shown = {
        name: value if value.ndim == 0 else [shard.data for shard in value.addressable_shards]
        for name, value in metrics.items() if name != "health"
    }
    values = {name: float(np.mean(value)) for name, value in jax.device_get(shown).items()}
    records.ledger.reached(step)
    tokens = values["real_tokens"]
    records.meta["tokens"] = records.meta.get("tokens", 0) + round(tokens)
    records.progress.update(step, values["loss"], tokens)
    rate = records.progress.tokens_per_second
    if rate is not None:
        values["tokens_per_second"] = rate
    if records.progress.mfu is not None:
        values["mfu"] = records.progress.mfu
    records.metrics.write(step, "train", **values)
    if records.monitor is not None:
        records.monitor.look(records.metrics, step, metrics["health"], values)
    elif not math.isfinite(values["loss"]) and "loss_scale" not in values:
        records.checkpoints.close()
        raise ValueError(
            f"the loss of step {step} is {values['loss']}: lower train.schedule.learning_rate or "
            f"train.optimizer.clip_norm; the last checkpoint is of step "
            f"{records.checkpoints.latest_step}"
        )
