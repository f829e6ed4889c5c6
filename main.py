"""The front door: takes an experiment apart and calls the rooms. The command line calls these."""

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from batiste.assembly import Assembly, assemble
from batiste.configs.experiment import Experiment, flatten, from_dict
from batiste.data import Loader, Prepared, load_prepared
from batiste.data import prepare as prepare_data
from batiste.evaluation import Perplexity
from batiste.inference import SamplingConfig
from batiste.models import resolve_attention
from batiste.planning import (
    SHOWN, Account, Budget, Choice, Machine, Workload, comparison, fits, machine_here, measure_cpu,
    memory_block, overrides, reason, rejections, remedy_line, search, table,
)
from batiste.sharding import AXES, MeshConfig
from batiste.train import (
    Checkpoints, Ledger, MetricsWriter, Records, Run, check_mode, check_same, fit, make_train_step,
)
from batiste.train.checkpoint import CHECKPOINT_FOLDER
from batiste.train.config import CheckpointConfig

CONFIG_FILE = "config.json"
# These change where or how a step is computed and recorded, not what it computes.
FREE_TO_CHANGE = (
    "mesh.", "sample.", "train.checkpoint.", "train.evaluation.", "train.stop.", "model.remat",
    "model.saved", "model.offloaded", "model.scan_unroll",
)


class Result(NamedTuple):
    """How training ended ("done", "patience", "SIGINT", "SIGTERM"), after which step, how good."""

    reason: str
    step: int
    validation: Perplexity | None


def prepare(experiment: Experiment, workdir: str | os.PathLike) -> Prepared:
    """Turns raw text into records under `workdir`/data, or finds that this is already done."""
    experiment.data.validate()
    prepared = prepare_data(experiment.data, pathlib.Path(workdir, "data"))
    if prepared.tokenizer.vocab_size > experiment.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={experiment.model.vocab_size}, but the tokenizer has "
            f"{prepared.tokenizer.vocab_size} tokens: set model.vocab_size at least that high"
        )
    return prepared


def plan(
    experiment: Experiment, machine: Machine | None, budget: Budget, compiles: bool = False,
    applies: bool = False,
) -> str:
    """What the experiment would take on a machine, on every mesh that it could have there.

    machine: None measures this machine's CPU. compiles: adds what the TPU's compiler says of the
    fastest plan that fits. applies: the answer is the overrides for that plan, and nothing else.
    Raises ValueError where nothing fits.
    """
    workload = _workload(experiment, "cpu" if machine is None else machine.device.kind)
    machine = measure_cpu(workload) if machine is None else machine
    account, check = Account(workload), _checker(experiment, machine)
    plans = search(account, machine, check)
    best = [each for each in plans if each.fits][:SHOWN]
    rejected = rejections(account, machine, plans, check)
    if not best:
        raise ValueError(f"nothing fits on {machine}; closest: {rejected[0]}")
    if applies:
        return overrides(best[0].choice, _choice(experiment, machine.num_devices))
    blocks = [table(account, machine, best, budget)]
    if rejected:
        blocks.append("\n".join(["would be faster, but do not fit:", *rejected]))
    if compiles:
        blocks.append(comparison(account, machine, best[0].choice))
    return "\n\n".join(blocks)


def train(
    experiment: Experiment, workdir: str | os.PathLike, resume: str = "auto", force: bool = False
) -> Result:
    """Prepares, trains, evaluates, samples, and writes it all under `workdir`.

    resume: "auto" continues from the newest checkpoint if there is one, "must" demands one,
    "never" refuses to find one. force: trains although the memory will not suffice. Raises
    ValueError for a config that cannot run, or that differs from the checkpoint's.
    """
    started = time.perf_counter()
    workdir = pathlib.Path(workdir)
    experiment.validate_on(len(jax.devices()))
    if not force:
        _check_memory(experiment)
    start, stored = _stored(workdir, experiment.train.checkpoint)
    check_mode(resume, start, str(workdir))
    flat = flatten(experiment)
    if start is not None:
        check_same(stored["config"], flat, FREE_TO_CHANGE)
    prepared = prepare(experiment, workdir)
    fingerprint = {"fingerprint of the data": prepared.fingerprint}
    if start is not None:
        check_same(stored["data"], fingerprint, ())
    assembly = assemble(experiment, workdir, prepared, experiment.mesh)
    _save_config(experiment, workdir)
    ledger = Ledger(workdir)
    ledger.write("phase", name="prepare", seconds=time.perf_counter() - started)
    meta = {"validation": [], **stored, "config": flat, "data": fingerprint}
    with contextlib.closing(Checkpoints(workdir, experiment.train.checkpoint)) as checkpoints:
        state, reason = _fit(assembly, checkpoints, ledger, meta, start)
    step = int(state.step)
    finished = not reason.startswith("SIG")
    return Result(reason, step, assembly.finish(state.params, ledger, step) if finished else None)


def evaluate(workdir: str | os.PathLike) -> Perplexity:
    """The perplexity of a trained work directory's newest checkpoint on its validation split."""
    assembly, params = _load(workdir)
    return assembly.measure(params)


def generate(
    workdir: str | os.PathLike,
    prompts: Sequence[str],
    config: SamplingConfig | None = None,
    on_text: Callable[[list[str]], None] | None = None,
) -> list[str]:
    """Continues each prompt with a trained work directory's newest checkpoint.

    config: None takes the one that the run was configured with. on_text is called, as text comes,
    with what each prompt gained.
    """
    assembly, params = _load(workdir)
    config = assembly.experiment.sample if config is None else config
    return assembly.write(params, prompts, config, on_text)


def load_experiment(workdir: str | os.PathLike) -> Experiment:
    """The experiment that a work directory remembers; ValueError if it holds none."""
    path = pathlib.Path(workdir, CONFIG_FILE)
    if not path.is_file():
        raise ValueError(
            f"workdir={workdir}: no {CONFIG_FILE} there, so no run; expected the --workdir of a "
            "`batiste train`"
        )
    return from_dict(Experiment, json.loads(path.read_text()))


def _check_memory(experiment: Experiment) -> None:
    """Raises ValueError, with the memory by kind and what to change, for a run that cannot fit."""
    machine = machine_here()
    if machine is None:
        return
    account = Account(_workload(experiment, machine.device.kind))
    choice = _choice(experiment, machine.num_devices)
    memory = account.estimate(choice)
    if fits(memory, machine):
        return
    remedy = remedy_line(account, machine, choice, _checker(experiment, machine))
    raise ValueError(
        f"this run does not fit on {machine}\n{memory_block(memory, machine)}\n"
        f"{reason(memory, machine)}: {remedy}; --force runs it all the same"
    )


def _workload(experiment: Experiment, device_kind: str) -> Workload:
    """What is planned, with attention settled for the device."""
    model, _ = resolve_attention(experiment.model, device_kind, {})
    return Workload(model, experiment.train, experiment.data.sequence_length)


def _choice(experiment: Experiment, num_devices: int) -> Choice:
    """What the config itself chooses."""
    sizes = dict(zip(AXES, experiment.mesh.shape(num_devices), strict=True))
    mesh = dataclasses.replace(experiment.mesh, **sizes)
    model = experiment.model
    return Choice(
        mesh, model.remat, experiment.train.accumulation, model.saved, model.offloaded
    )


def _checker(experiment: Experiment, machine: Machine) -> Callable[[Choice], None]:
    """Raises ValueError for a choice that this experiment could not run with."""

    def check(choice: Choice) -> None:
        dataclasses.replace(
            experiment,
            mesh=choice.mesh,
            model=dataclasses.replace(experiment.model, **choice.policy._asdict()),
            train=dataclasses.replace(experiment.train, accumulation=choice.accumulation),
        ).validate_on(machine.num_devices)

    return check


def _stored(workdir: pathlib.Path, config: CheckpointConfig) -> tuple[int | None, dict[str, Any]]:
    """The newest committed step, and what was saved beside its arrays; creates nothing."""
    if not (workdir / CHECKPOINT_FOLDER).is_dir():
        return None, {}
    with contextlib.closing(Checkpoints(workdir, config)) as checkpoints:
        step = checkpoints.latest_step
        return step, {} if step is None else checkpoints.meta(step)


def _fit(
    assembly: Assembly, checkpoints: Checkpoints, ledger: Ledger, meta: dict[str, Any], start: int | None
) -> tuple[Any, str]:
    """Trains from the checkpoint of step `start`, or from nothing; the state, and why it ended."""
    experiment = assembly.experiment
    if start is None:
        state = assembly.program.initialize()
    else:
        state = checkpoints.restore(start, assembly.program.abstract_state)
        print(f"continuing from step {start} of {assembly.workdir}", flush=True)
    ledger.lap("initialize")
    loader = Loader(assembly.prepared, "train", experiment.train.batch_size, experiment.data.seed)
    batches = loader.iterate(start or 0)
    progress, last_step = assembly.progress()
    metrics = MetricsWriter(assembly.workdir, start or 0)
    run = Run(
        train_step=make_train_step(assembly.program, experiment.train, assembly.mesh),
        batches=map(assembly.place, batches),
        evaluate=lambda state: assembly.measure(
            state.params, experiment.train.evaluation.max_batches
        ).loss,
        last_step=last_step,
    )
    try:
        return fit(experiment.train, state, run,
                   Records(checkpoints, metrics, progress, ledger, meta))
    finally:
        batches.close()
        metrics.close()


def _load(workdir: str | os.PathLike) -> tuple[Assembly, Any]:
    """Assembly and parameters of the newest checkpoint, replicated over the devices that are here."""
    workdir = pathlib.Path(workdir)
    experiment = load_experiment(workdir)
    step, stored = _stored(workdir, experiment.train.checkpoint)
    check_mode("must", step, str(workdir))
    fingerprint = stored["data"]["fingerprint of the data"]
    prepared = load_prepared(pathlib.Path(workdir, "data", fingerprint[:12]))
    assembly = assemble(experiment, workdir, prepared, MeshConfig())
    with contextlib.closing(Checkpoints(workdir, experiment.train.checkpoint)) as checkpoints:
        return assembly, checkpoints.restore_params(step, assembly.program.abstract_state.params)


def _save_config(experiment: Experiment, workdir: pathlib.Path) -> None:
    temporary = workdir / f"{CONFIG_FILE}.tmp"
    temporary.write_text(json.dumps(dataclasses.asdict(experiment), indent=1) + "\n")
    os.replace(temporary, workdir / CONFIG_FILE)
