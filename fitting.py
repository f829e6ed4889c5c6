"""Training from a checkpoint or from nothing to the end, with what was decided about the run."""

import dataclasses
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
    Checkpoints, Decision, Ledger, MetricsWriter, Monitor, Records, Replicas, RollBack, Run, Watched, decide,
    decided, decisions_of, faulty_batches, fit, from_checkpoint, make_train_step, parse_fault,
    roll_back, skipped, start_of, steered,
)


def train_from(
    assembly: Assembly, checkpoints: Checkpoints, ledger: Ledger, meta: dict[str, Any], start: int | None
) -> tuple[Any, str]:
    """Trains from the checkpoint of step `start`, or from nothing; the state, and why it ended.

    What was decided about the run before holds, also what the checkpoint does not know yet.
    """
    train = assembly.experiment.train
    known, everything = decisions_of(meta), _decided(assembly.workdir)
    meta["decisions"] = [dataclasses.asdict(decision) for decision in everything]
    before, start = start, start_of(start, known, everything)
    if start != before:
        meta = _rewound(checkpoints, meta, start)
    train_step = make_train_step(assembly.program, train, assembly.mesh)
    while True:
        try:
            return _fit_from(assembly, checkpoints, ledger, meta, start, train_step)
        except RollBack as asked:
            checkpoints.wait()
            decision = roll_back(
                asked.finding, checkpoints.verified(), decisions_of(meta), train.health.roll_back)
            decide(decision, meta, ledger)
            start = decision.to or None
            meta = _rewound(checkpoints, meta, start)


def _decided(workdir: pathlib.Path) -> list[Decision]:
    """The decisions in the ledger, as the first process reads it."""
    def read() -> str:
        return json.dumps([dataclasses.asdict(decision) for decision in decided(workdir)])

    return decisions_of({"decisions": json.loads(together(
        "read what was decided", read if is_first() else str)[0])})


def _rewound(checkpoints: Checkpoints, meta: dict[str, Any], start: int | None) -> dict[str, Any]:
    """Sets aside what was saved after `start`; the meta of a run that continues there."""
    checkpoints.set_aside_from((start or 0) + 1)
    stored = {} if start is None else checkpoints.meta(start)
    return {"validation": [], **stored} | {
        name: meta[name] for name in ("config", "data", "arrays", "decisions")}


def _fit_from(
    assembly: Assembly, checkpoints: Checkpoints, ledger: Ledger, meta: dict[str, Any],
    start: int | None, train_step: Callable,
) -> tuple[Any, str]:
    """The same, until the monitor asks to go back, which is a RollBack."""
    experiment = assembly.experiment
    if start is None:
        state = beginning(assembly)
    else:
        ledger.enter("restore")
        state = checkpoints.restore(start, assembly.program.abstract_state)
        state = from_checkpoint(assembly.program, state, stored_mesh(checkpoints.meta(start)))
        if is_first():
            print(f"continuing from step {start} of {assembly.workdir}", flush=True)
    ledger.enter("initialization")
    loader = Loader(assembly.prepared, "train", experiment.train.batch_size, experiment.data.seed,
                    assembly.transform)
    share = Share(assembly.mesh, experiment.train.batch_size)
    windows = skipped(decisions_of(meta))
    batches = loader.iterate(start or 0, share.rows, windows)
    places = (position(step, windows) for step in itertools.count(start or 0))
    faulty = faulty_batches(
        parse_fault(experiment.train.faults), zip(places, batches),
        assembly.prepared.tokenizer.vocab_size)
    placed = map(share.place, faulty)
    progress, last_step = assembly.progress()
    monitor = None
    if experiment.train.measures:
        monitor = Monitor(experiment.train, Watched(
            meta, ledger, meta["config"], progress.note,
            lambda step: loader.records(position(step - 1, windows))))
        monitor.remember(assembly.workdir, start or 0)
        placed = monitor.watch(placed)
    metrics = MetricsWriter(assembly.workdir if is_first() else None, start or 0)
    ledger.write("from", step=start or 0, reached=metrics.reached)
    if monitor is not None or decisions_of(meta):
        train_step = steered(
            train_step, meta, lambda factor: replicate(assembly.mesh, np.float32(factor)),
            start or 0)
    run = Run(
        train_step=train_step,
        batches=placed,
        evaluate=lambda state: assembly.measure(
            state.params, experiment.train.evaluation.max_batches
        ).loss,
        last_step=last_step,
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
