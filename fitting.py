"""Training from a checkpoint or from nothing to the end, with what was decided about the run."""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from batiste.assembly import Assembly
from batiste.data import Loader, position
from batiste.exchange import beginning
from batiste.sharding import MeshConfig, Share, is_first, replicate, together
from batiste.train import (
    Checkpoints, Decision, Ledger, MetricsWriter, Monitor, Records, Replicas, RollBack, Run, Watched,
    all_decisions, batch_sizes_of, decide, decided, decisions_of, faulty_batches, fit,
    from_checkpoint, make_train_step, parse_fault, records_before, roll_back, skipped, start_of,
    steered, with_batch_size,
)


def train_from(
    assembly: Assembly, checkpoints: Checkpoints, ledger: Ledger, meta: dict[str, Any], start: int | None
) -> tuple[Any, str]:
    """Trains from the checkpoint of step `start`, or from nothing; the state, and why it ended.

    What was decided about the run before holds, also what the checkpoint does not know yet.
    """
    train = assembly.experiment.train
    known, written = decisions_of(meta), _decided(assembly.workdir)
    everything = all_decisions(known, written)
    for decision in everything:
        if decision not in written:  # Lines of the ledger are gone.
            ledger.write("decision", **dataclasses.asdict(decision))
    meta["decisions"] = [dataclasses.asdict(decision) for decision in everything]
    before, start = start, start_of(start, known, everything)
    if start != before:
        _rewind(checkpoints, meta, start)
    train_step = make_train_step(assembly.program, train, assembly.mesh)
    while True:
        try:
            return _fit_from(assembly, checkpoints, ledger, meta, start, train_step)
        except RollBack as asked:
            checkpoints.wait()
            decision = roll_back(
                asked.finding, checkpoints.verified(), decisions_of(meta), train.health.roll_back,
                batch_sizes_of(meta))
            decide(decision, meta, ledger)
            start = decision.to or None
            _rewind(checkpoints, meta, start)


def _decided(workdir: pathlib.Path) -> list[Decision]:
    """The decisions in the ledger, as the first process reads it."""
    def read() -> str:
        return json.dumps([dataclasses.asdict(decision) for decision in decided(workdir)])

    return decisions_of({"decisions": json.loads(together(
        "read what was decided", read if is_first() else str)[0])})


def _rewind(checkpoints: Checkpoints, meta: dict[str, Any], start: int | None) -> None:
    """Sets aside what was saved after `start`; makes `meta` that of a run that continues there."""
    checkpoints.set_aside_from((start or 0) + 1)
    kept = {name: meta[name] for name in ("config", "data", "arrays", "decisions")}
    stored = {} if start is None else checkpoints.meta(start)
    meta.clear()
    meta.update({"validation": [], **stored} | kept)


def _count_on(assembly: Assembly, meta: dict[str, Any], stored: dict[str, Any], start: int) -> None:
    """Lets the batch sizes and the tokens in `meta` go on from those that were stored."""
    train, length = assembly.experiment.train, assembly.experiment.data.sequence_length
    sizes = batch_sizes_of(stored) if start else []
    meta["batch_sizes"] = with_batch_size(sizes, start, train.batch_size)
    # A version that did not count them took all places of the records for tokens.
    meta.setdefault("tokens", records_before(meta["batch_sizes"], start) * length)


def _fit_from(
    assembly: Assembly, checkpoints: Checkpoints, ledger: Ledger, meta: dict[str, Any],
    start: int | None, train_step: Callable,
) -> tuple[Any, str]:
    """The same, until the monitor asks to go back, which is a RollBack."""
    experiment = assembly.experiment
    stored = {} if start is None else checkpoints.meta(start)
    _count_on(assembly, meta, stored, start or 0)
    if start is None:
        state = beginning(assembly)
    else:
        ledger.enter("restore")
        state = checkpoints.restore(start, assembly.program.abstract_state)
        state = from_checkpoint(assembly.program, state, stored_mesh(stored))
        if is_first():
            print(f"continuing from step {start} of {assembly.workdir}", flush=True)
    ledger.enter("initialization")
    loader = Loader(assembly.prepared, "train", experiment.train.batch_size, experiment.data.seed,
                    assembly.transform)
    share = Share(assembly.mesh, experiment.train.batch_size)
    windows, rows = skipped(decisions_of(meta)), experiment.train.batch_size
    read = functools.partial(records_before, meta["batch_sizes"])
    batches = loader.iterate(read(start or 0), share.rows, windows)
    places = (int(position(read(step), windows)) // rows for step in itertools.count(start or 0))
    faulty = faulty_batches(
        parse_fault(experiment.train.faults), zip(places, batches),
        assembly.prepared.tokenizer.vocab_size)
    progress, last_step = assembly.progress(start or 0, read(start or 0))
    meta["last_step"] = last_step
    monitor, placed = None, map(share.place, faulty)
    if experiment.train.measures:
        monitor = Monitor(experiment.train, Watched(
            meta, ledger, meta["config"], progress.note,
            lambda step: loader.records(read(step - 1), read(step) - read(step - 1), windows)))
        monitor.remember(assembly.workdir, start or 0)
        placed = monitor.watch(map(share.place, monitor.inspect(faulty)))
    metrics = MetricsWriter(assembly.workdir if is_first() else None, start or 0, meta["config"],
                            Monitor.look_back(experiment.train.health.window))
    metrics.say_what_is_missing(ledger)
    ledger.write("from", step=start or 0, reached=metrics.reached, records=read(start or 0))
    if monitor is not None or decisions_of(meta):
        train_step = steered(
            train_step, meta, lambda factor: replicate(assembly.mesh, np.float32(factor)),
            start or 0)
    run = Run(
        train_step=train_step,
        batches=placed,
        evaluate=lambda state: assembly.validation(
            state.params, experiment.train.evaluation.max_batches),
        last_step=last_step,
        sample=(lambda state, step: assembly.sample(state.params, step))
        if experiment.train.evaluation.samples else None,
    )
    replicas = None
    if experiment.train.health.replicas_every is not None and assembly.mesh.size > 1:
        def report(event: str, **fields: Any) -> None:
            ledger.write(event, **fields)
            progress.note(f"{event} after step {fields['step']}: {fields['what']} [{fields['action']}]")

        def newest() -> int | None:
            checkpoints.wait()
            return checkpoints.latest_step

        replicas = Replicas(experiment.train.health, assembly.mesh,
                            assembly.program.abstract_state, report, newest)
    try:
        return fit(experiment.train, state, run,
                   Records(checkpoints, metrics, progress, ledger, meta, monitor, replicas))
    finally:
        batches.close()
        metrics.close()


def stored_mesh(meta: dict[str, Any]) -> MeshConfig:
    """The mesh that a checkpoint was saved on, as far as it decides the order of the layers."""
    config = meta["config"]  # Checkpoints of before there was interleaving lack that field.
    return MeshConfig(stage=config["mesh.stage"], interleave=config.get("mesh.interleave", 1))
