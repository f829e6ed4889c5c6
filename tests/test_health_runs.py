"""Whole runs that meet a fault: what is decided is done, once, and survives being killed."""

import json
import pathlib
import random
import shutil

import pytest

from batiste import assembly, fitting, main
from batiste.configs.experiment import Experiment
from batiste.data import DataConfig, SourceConfig
from batiste.inference import SamplingConfig
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig
from batiste.train import diagnose, loop, write_diagnosis
from batiste.train.metrics import read_metrics

STEPS, POISON = 120, 40
WORDS = "the quick brown fox jumps over a lazy dog while seven green bottles hang on walls".split()


class Killed(Exception):
    """Stands in for SIGKILL: nothing is saved on the way out."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """Thirty files of words."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(30):
        draw = random.Random(number)
        text = " ".join(draw.choice(WORDS) for _ in range(300))
        (folder / f"{number}.txt").write_text(text)
    return f"{folder}/*.txt"


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """Runs, or continues, a work directory of a name; all share one program, for faults of data and
    policies are the host's. kill: after the record of which step, of those from now on."""
    shared, folder = {}, tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()

    def once(name, make):
        return lambda *arguments: shared.setdefault(name, None) or shared.update(
            {name: make(*arguments)}) or shared[name]

    for module, name in ((assembly, "make_program"), (fitting, "make_train_step"),
                         (assembly, "make_row_losses")):
        patch.setattr(module, name, once(name, getattr(module, name)))
    patch.setattr(assembly, "total_peak_flops", lambda mesh, dtype: (None, "not measured"))
    patch.setattr(assembly, "generate", lambda *_, **__: iter(()))
    record = loop._record

    def start(name, policy="log", faults=None, kill=None):
        def recorded(records, step, metrics):
            record(records, step, metrics)
            # After a roll-back alone: before it there is a later step to come.
            if step == kill and (policy == "log" or records.meta["decisions"]):
                raise Killed

        workdir = folder / name
        if not workdir.exists() and any(folder.iterdir()):
            shutil.copytree(next(folder.glob("*/data")), workdir / "data")
        experiment = _experiment(corpus)
        experiment.train.health.policies = f"data_fault={policy}"
        experiment.train.faults = faults
        patch.setattr(loop, "_record", recorded)
        try:
            return workdir, main.train(experiment, workdir)
        except Killed:
            return workdir, None

    yield start
    patch.undo()


def _experiment(corpus: str) -> Experiment:
    experiment = Experiment(
        model=TransformerConfig(
            vocab_size=300, num_layers=2, model_dim=24, num_heads=2, num_kv_heads=1, head_dim=12,
            mlp_dim=40, max_length=32, activation="relu2"),
        data=DataConfig(sources=(SourceConfig(path=corpus),), tokenizer="bytes",
                        sequence_length=32, validation_fraction=0.2),
        mesh=MeshConfig(data=8), sample=SamplingConfig(max_tokens=1, prompts=("a",)),
    )
    train = experiment.train
    train.num_steps, train.batch_size, train.health.window, train.health.roll_back = STEPS, 8, 24, 4
    train.schedule.warmup_steps, train.schedule.learning_rate = 10, 0.01
    train.checkpoint.every, train.checkpoint.keep, train.evaluation.every = 10, 3, STEPS
    return experiment


def losses(workdir: pathlib.Path, last: int = STEPS) -> dict[int, tuple[float, float]]:
    """Loss and learning rate of each step, in all their digits."""
    return {record["step"]: (record["loss"], record["learning_rate"])
            for record in read_metrics(workdir)
            if record["kind"] == "train" and record["step"] <= last}


def events(workdir: pathlib.Path, name: str) -> list[dict]:
    """Those of the ledger."""
    lines = map(json.loads, (workdir / "ledger.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == name]


GARBAGE = f"garbage:step={POISON}"


@pytest.mark.slow
def test_rolling_back_ends_as_good_as_if_it_had_never_been(run):
    _, unharmed = run("unharmed")
    workdir, healed = run("healed", "roll_back", GARBAGE)
    assert healed.validation.loss == pytest.approx(unharmed.validation.loss, rel=0.01)
    (decision,), (finding,) = events(workdir, "decision"), events(workdir, "finding")
    assert finding["kind"] == "data_fault" and finding["step"] == POISON
    assert (decision["to"], decision["skip_records"]) == (30, [8 * 36, 8 * 40])
    meta = json.loads((workdir / "checkpoints" / str(STEPS) / "meta.json").read_text())
    assert [fields["skip_records"] for fields in meta["decisions"]] == [[8 * 36, 8 * 40]]

    (found,) = diagnose(workdir)
    assert (found.kind, found.step) == ("data_fault", POISON) and len(found.examples) == 8
    text = write_diagnosis(workdir)
    assert "data_fault" in text and found.remedy in text
    assert (workdir / "doctor.png").exists() and (workdir / "doctor.md").read_text() == text


@pytest.mark.slow
def test_only_the_skipped_window_changes_the_order_of_the_data(run):
    unharmed, healed = losses(run("unharmed")[0]), losses(run("healed", "roll_back", GARBAGE)[0])
    assert [unharmed[step] for step in range(1, 37)] == [healed[step] for step in range(1, 37)]
    assert unharmed[37] != healed[37]


@pytest.mark.slow
def test_a_run_that_is_killed_after_a_roll_back_repeats_the_decision(run):
    workdir, _ = run("healed", "roll_back", GARBAGE)
    # Before a checkpoint knows of the decision, and after.
    for kill in (33, 55):
        killed, result = run("killed", "roll_back", GARBAGE, kill=kill)
        assert result is None
    killed, result = run("killed", "roll_back", GARBAGE)
    assert result.reason == "done"
    assert losses(killed) == losses(workdir)
    assert len(events(killed, "decision")) == 1


@pytest.mark.slow
def test_a_lowered_learning_rate_stays_lowered_when_killed(run):
    whole, _ = run("lowered", "lower", GARBAGE, kill=65)
    rates = {step: rate for step, (_, rate) in losses(whole).items()}
    usual = {step: rate for step, (_, rate) in losses(run("unharmed")[0]).items()}
    assert rates[POISON + 1] == usual[POISON + 1]
    assert rates[POISON + 2] == pytest.approx(usual[POISON + 2] / 2)
    for kill in (45, 55, 65):
        killed, _ = run("lowered_killed", "lower", GARBAGE, kill=kill)
    assert losses(killed, 64) == losses(whole, 64)
    assert len(events(killed, "decision")) == 1


def test_a_run_that_is_to_stop_stops(run):
    with pytest.raises(ValueError, match=f"data_fault at step {POISON} in records.*data_fault=stop"):
        run("stopped", "stop", GARBAGE)
