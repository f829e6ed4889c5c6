"""What a config does, seen from outside: probes that test_config_fields.py compares.

A probe takes an Experiment (and the directory of the tiny corpus) and returns a tree of arrays,
numbers and text. Where most fields share their operations, eager evaluation stands in for
compilation, and takes a tenth of the time; a whole step is compiled in a fifth of its eager time.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import tempfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from batiste import assembly, fitting, main
from batiste.configs.experiment import Experiment, flatten
from batiste.data import Batch, Loader
from batiste.evaluation import make_row_losses
from batiste.models import Transformer
from batiste.sharding import MeshConfig, laid_out, make_mesh, place, time_order
from batiste.train import (
    Checkpoints, Ledger, Monitor, Replicas, TrainConfig, TrainState, Watched, make_program,
    make_train_step, roll_back,
)
from batiste.train.detector import Detector
from batiste.train.findings import Finding
from batiste.train.health import CLASSES
from batiste.train.health_record import health_record
from batiste.train.health_statistics import HealthStatistics
from batiste.train.local_steps import make_exchange
from batiste.train.metrics import read_metrics
from batiste.train.samples import read_samples

TOKENS_BT = np.arange(16, dtype=np.int32).reshape(2, 8) % 7
BATCH = Batch(TOKENS_BT, TOKENS_BT + 1, np.ones((2, 8), np.float32),
              np.int32([[1] * 3 + [2] * 5] * 2), np.int32([[0, 1, 2, 0, 1, 2, 3, 4]] * 2))


def change(experiment: Experiment, name: str, value) -> None:
    """Sets the field of a dotted name."""
    *path, last = re.findall(r"\w+", name)
    for part in path:
        experiment = experiment[int(part)] if part.isdigit() else getattr(experiment, part)
    getattr(experiment, last)  # a field that does not exist is an error of the table
    setattr(experiment, last, value)


def shapes(experiment: Experiment, _):
    """The shape of each parameter."""
    model = nnx.eval_shape(lambda: Transformer(experiment.model, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def logits(experiment: Experiment, _):
    """Logits of two packed rows with dropout, and the parameters at the start."""
    with jax.disable_jit():
        model = Transformer(experiment.model, rngs=nnx.Rngs(0))
        logits_BTV = model(jnp.asarray(TOKENS_BT), jnp.asarray(BATCH.positions_BT),
                           jnp.asarray(BATCH.segments_BT), jax.random.key(1))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param)), logits_BTV


def _program(experiment: Experiment):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    program = make_program(experiment.model, experiment.train, mesh, MeshConfig(data=1))
    return program, mesh, make_train_step(program, experiment.train, mesh)


def step_text(experiment: Experiment, _):
    """The training step as it is handed to the compiler: for what changes only how it computes."""
    program, mesh, step = _program(experiment)
    with jax.set_mesh(mesh):
        return step.jitted.lower(program.abstract_state, BATCH).as_text()


def tpu_step_text(experiment: Experiment, _):
    """The training step as it is handed to the TPU's compiler: for what a CPU cannot run."""
    program, mesh, step = _program(experiment)
    with jax.set_mesh(mesh):
        traced = step.jitted.trace(program.abstract_state, BATCH)
        return traced.lower(lowering_platforms=("tpu",)).as_text()


def pipeline_text(experiment: Experiment, _):
    """The training step on all devices as it is handed to the compiler."""
    mesh = make_mesh(experiment.mesh)
    program = make_program(experiment.model, experiment.train, mesh, experiment.mesh)
    step = make_train_step(program, experiment.train, mesh)
    batch = jax.tree.map(lambda x: np.tile(x, (experiment.train.batch_size // 2, 1)), BATCH)
    with jax.set_mesh(mesh):
        return step.jitted.lower(program.abstract_state, batch).as_text()


def start(experiment: Experiment, _):
    """The training state before the first step."""
    with jax.disable_jit():
        return _program(experiment)[0].initialize()


def two_steps(experiment: Experiment, _):
    """The training state after two real steps, and the metrics of the second."""
    program, mesh, step = _program(experiment)
    batch = place(mesh, BATCH, Batch(*("BS",) * 5))
    return step(step(program.initialize(), batch)[0], batch)


def watched(experiment: Experiment, _):
    """What a monitor writes of four steps, says of forty bad ones, and does about each class."""
    def monitor():
        meta = {"decisions": []}
        return Monitor(experiment.train, Watched(
            meta, Ledger(None), flatten(experiment), lambda line: None, lambda step: range(8)))

    looks, norms = [], {"layers.up_DF": np.ones(2), "head_DV": np.float32(1)}
    layers = dict.fromkeys(("rms_L", "largest_L", "entropy_L", "logit_L", "dead_L"), np.ones(2))
    updates = {name: norm / 100 for name, norm in norms.items()}
    statistics = HealthStatistics(
        norms, norms, updates, **layers | {"dead_L": np.zeros(2)}, router_load_L=None,
        router_idle_L=None, router_spread_L=None, loss_B=np.ones(8), checksum_B=np.arange(8))
    metrics = {"loss": 1.0, "gradient_norm": 1.0, "learning_rate": 1.0}
    writer = SimpleNamespace(write_health=lambda step, record: looks.append(step))
    one = monitor()
    for step, _ in enumerate(one.inspect([BATCH] * 4), start=1):
        one.look(writer, step, statistics, metrics)
    detector = Detector(flatten(experiment))
    said = []
    for step in range(40):
        values = metrics | {"loss": np.nan if step % 20 == 10 else 1.0}
        record = health_record(statistics, values, 1.0, 0.0, {})
        said.append(len(detector.observe({"step": step, **record})))
    finding = Finding("loss_spike", 50, None, None, (), {}, "", "")
    goes = roll_back(finding, [30, 40, 45, 49], [], experiment.train.health.roll_back,
                     [[0, 8]])
    done = []
    for kind in CLASSES:
        try:
            done.append(monitor()._act([dataclasses.replace(finding, kind=kind)]))
        except ValueError as error:
            done.append(str(error))
    replicas = Replicas(experiment.train.health, make_mesh(MeshConfig()), {})
    compared = [step for step in range(1, 9) if replicas.due(step)]
    return looks, said, dataclasses.asdict(goes), done, compared


def rates(experiment: Experiment, _):
    """The learning rate of each step."""
    schedule = _program(experiment)[0].schedule
    return [float(schedule(step)) for step in range(experiment.train.num_steps)]


def updates(experiment: Experiment, _):
    """Two updates of the program's optimizer from gradients of norm well above one."""
    program = _program(experiment)[0]
    random = np.random.default_rng(0)
    params, *gradients = (
        jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32),
                     program.abstract_state.params) for _ in range(3)
    )
    with jax.disable_jit():
        state = program.optimizer.init(params)
        first, state = program.optimizer.update(gradients[0], state, params)
        return first, program.optimizer.update(gradients[1], state, params)[0]


def exchanged(experiment: Experiment, _):
    """What two slices agree on that each went its own way."""
    sizes = MeshConfig(slice=2, data=1)
    mesh, train = make_mesh(sizes, jax.devices()[:2]), experiment.train
    program = make_program(experiment.model, train, mesh, sizes)
    state, random = program.initialize(), np.random.default_rng(0)
    own = jax.tree.map(
        lambda leaf: jax.device_put(np.float32(random.normal(size=leaf.shape)), leaf.sharding),
        state.workers.params)
    exchange = jax.jit(make_exchange(train.local, program.letters, sizes.zero))
    with jax.set_mesh(mesh):
        return exchange(state.params, state.optimizer_state, own, state.workers.residual)[0]


def layout(experiment: Experiment, _):
    """The shardings on the 8 devices and the order of a row, or why there are none."""
    try:
        experiment.validate_on(8)
    except ValueError as error:
        return str(error)
    program = make_program(
        experiment.model, experiment.train, make_mesh(experiment.mesh), experiment.mesh)
    specs = jax.tree.map(
        lambda leaf: f"{leaf.sharding.spec} {leaf.sharding.memory_kind}", program.abstract_state)
    mesh = jax.tree.leaves(program.abstract_state)[0].sharding.mesh
    with jax.set_mesh(mesh), laid_out(experiment.mesh):
        order = time_order(experiment.data.sequence_length)
    return specs, tuple(mesh.shape.items()), order


def records(experiment: Experiment, corpus: pathlib.Path):
    """The tokens of the first training batches and of the validation split."""
    with tempfile.TemporaryDirectory(dir=corpus) as workdir:
        prepared = main.prepare(experiment, workdir)
        training = Loader(prepared, "train", 8, experiment.data.seed)
        held_out = Loader(prepared, "validation", 8, experiment.data.seed)
        return [training.batch(step) for step in range(4)], list(held_out.epoch_batches())


class _Captured(Exception):
    """Carries what the loop was about to read."""


def first_batch(experiment: Experiment, corpus: pathlib.Path):
    """The first batch that the real `train` hands to the loop."""
    def fit(config, state, run, records):
        raise _Captured(next(run.batches))

    def program(*arguments):
        return make_program(*arguments)._replace(initialize=lambda: None)

    replaced = {(fitting, "fit"): fit, (assembly, "make_program"): program,
                (assembly, "total_peak_flops"): _no_peak}
    with tempfile.TemporaryDirectory(dir=corpus) as workdir, _replacing(replaced):
        try:
            main.train(experiment, workdir)
        except _Captured as captured:
            return captured.args[0]


def run(experiment: Experiment, corpus: pathlib.Path):
    """What the real `train` leaves: why and when it ended, metrics, checkpoints, samples by step."""
    with tempfile.TemporaryDirectory(dir=corpus) as workdir, _replacing(SHARED):
        workdir = pathlib.Path(workdir)
        result = main.train(experiment, workdir)
        metrics = [{name: value for name, value in record.items()
                    if name not in ("tokens_per_second", "mfu")}
                   for record in read_metrics(workdir)]
        saved = sorted(path.name for path in (workdir / "checkpoints").glob("[0-9]*"))
        sampled = [sample["step"] for sample in read_samples(workdir)]
        samples = re.search(r"^## Samples\n.*?(?=^## |\Z)", (workdir / "report.md").read_text(),
                            re.S | re.M)[0]
        kept = corpus / "run"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(workdir, kept)
        return result.reason, result.step, metrics, saved, samples, sampled


def failed_saves(experiment: Experiment, corpus: pathlib.Path) -> int:
    """How many saves may fail before the last of them stops the run."""
    state = TrainState(np.int32(1), {"a": np.ones(3, np.float32)}, (), None)
    with tempfile.TemporaryDirectory(dir=corpus) as workdir:
        checkpoints = Checkpoints(pathlib.Path(workdir), experiment.train.checkpoint)
        checkpoints.save(1, state, {})
        checkpoints.finish(1, state, {})
        shutil.rmtree(checkpoints.folder)
        checkpoints.folder.write_text("not a directory")
        for step in range(2, 10):
            try:
                checkpoints.save(step, state, {})
            except ValueError:
                break
    return step


def generated(experiment: Experiment, corpus: pathlib.Path):
    """Text that a trained work directory generates when its config is this one."""
    if not (corpus / "run").is_dir():
        run(experiment, corpus)
    with _replacing({(assembly, "make_program"): _shared_program}):
        (corpus / "run" / "config.json").write_text(json.dumps(dataclasses.asdict(experiment)))
        return main.generate(corpus / "run", ["ab", "the"])


def _no_peak(mesh, dtype):
    return None, "not measured"


_compiled: dict = {}


def _shared_program(model, train: TrainConfig, mesh, layout):
    """One program for all configs that differ only in what the loop reads; steps share likewise."""
    blank = TrainConfig()
    same = dataclasses.replace(train, num_steps=0, checkpoint=blank.checkpoint,
                               evaluation=blank.evaluation, stop=blank.stop)
    key = repr((model, same, mesh.shape, layout))
    if key not in _compiled:
        _compiled[key] = make_program(model, train, mesh, layout)
    return _compiled[key]


def _shared_step(program, config, mesh):
    key = id(program), "step"
    if key not in _compiled:
        _compiled[key] = make_train_step(program, config, mesh)
    return _compiled[key]


def _shared_row_losses(program, mesh, objective):
    key = id(program), "row losses"
    if key not in _compiled:
        _compiled[key] = make_row_losses(program, mesh, objective)
    return _compiled[key]


SHARED = {
    (assembly, "make_program"): _shared_program, (fitting, "make_train_step"): _shared_step,
    (assembly, "make_row_losses"): _shared_row_losses, (assembly, "total_peak_flops"): _no_peak,
    (assembly, "generate"): lambda *_, **__: iter(()),
}


class _replacing:
    """Swaps names of a module for the time of a probe: what is swapped is not what is probed."""

    def __init__(self, replaced: dict):
        self._replaced = replaced

    def __enter__(self):
        self._before = {place: getattr(*place) for place in self._replaced}
        for place, value in self._replaced.items():
            setattr(*place, value)

    def __exit__(self, *_):
        for place, value in self._before.items():
            setattr(*place, value)
