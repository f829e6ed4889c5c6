"""What a resume finds, refuses by name, passes over, and may override; test_chaos.py kills."""

import dataclasses
import json
import pathlib
import re
import shutil

import pytest

from batiste import command_line, main
from batiste.configs.experiment import Experiment
from batiste.data import DataConfig, SourceConfig, order
from batiste.inference import SamplingConfig
from batiste.main import evaluate, generate, train
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig
from batiste.train import Found, batch_sizes_of, records_before, why_ended, with_batch_size
from batiste.train.config import StopConfig
from batiste.train.metrics import read_metrics
from batiste.train.resume import check_mode

STEPS = 30


def tiny_experiment(corpus: str) -> Experiment:
    """Thirty steps of a very small model of bytes; dropout on, so that its keys matter too."""
    experiment = Experiment(
        model=TransformerConfig(
            vocab_size=300, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8,
            mlp_dim=24, max_length=32, dropout=0.1,
        ),
        data=DataConfig(
            sources=(SourceConfig(path=corpus),), tokenizer="bytes", sequence_length=32,
            validation_fraction=0.3,
        ),
        mesh=MeshConfig(),
        sample=SamplingConfig(max_tokens=5, prompts=("a", "bc")),
    )
    experiment.train.num_steps, experiment.train.batch_size = STEPS, 8
    experiment.train.schedule.warmup_steps = 3
    experiment.train.checkpoint.every = experiment.train.evaluation.every = 5
    return experiment


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """Forty small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(40):
        text = "".join(f"{index * line} is {index} times {line}\n" for line in range(30))
        (folder / f"{index}.txt").write_text(text)
    return f"{folder}/*.txt"


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> pathlib.Path:
    """The work directory of a run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    assert train(tiny_experiment(corpus), workdir).reason == "done"
    return workdir


def losses(workdir: pathlib.Path) -> dict[tuple[str, int], float]:
    """Every recorded loss, training and validation, in all its digits."""
    return {(record["kind"], record["step"]): record["loss"] for record in read_metrics(workdir)}


def test_a_run_leaves_what_it_should(uninterrupted):
    for name in ("config.json", "metrics.jsonl", "ledger.jsonl", "loss.png", "report.md",
                 "checkpoints/30", "tensorboard", "data"):
        assert (uninterrupted / name).exists(), name
    assert sorted(losses(uninterrupted)) == sorted(
        [("train", step) for step in range(1, STEPS + 1)]
        + [("validation", step) for step in range(5, STEPS + 1, 5)])
    report = (uninterrupted / "report.md").read_text()
    for piece in ("Best validation loss", "xz -9e", "Samples", "seconds", "orbax-checkpoint"):
        assert piece in report, piece


@pytest.fixture(scope="module")
def one_step(corpus, tmp_path_factory) -> pathlib.Path:
    """A work directory where one step of thirty is done, only to be copied."""
    experiment, workdir = tiny_experiment(corpus), tmp_path_factory.mktemp("one_step")
    experiment.train.stop.flops = 1.0  # One step, the least there is.
    experiment.train.checkpoint.every = 1
    assert train(experiment, workdir).step == 1
    return workdir


@pytest.fixture
def halfway(one_step, corpus, tmp_path) -> tuple[Experiment, pathlib.Path]:
    """An experiment, and a work directory where one of its steps is done."""
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    experiment = tiny_experiment(corpus)
    experiment.train.checkpoint.every = 1
    return experiment, tmp_path


def test_a_changed_config_or_text_is_refused_by_name(halfway, corpus):
    experiment, workdir = halfway
    experiment.train.schedule.learning_rate *= 2
    experiment.model.mlp_dim = 40
    with pytest.raises(ValueError, match="model.mlp_dim was 24, is 40.*learning_rate was"):
        train(experiment, workdir)
    experiment = tiny_experiment(corpus)
    folder = pathlib.Path(corpus).parent
    more = folder / "more.txt"
    more.write_text("one document more")
    try:
        with pytest.raises(ValueError, match="data fingerprint was"):
            train(experiment, workdir)
    finally:
        more.unlink()


def test_resume_modes(halfway, corpus, tmp_path_factory):
    experiment, workdir = halfway
    with pytest.raises(ValueError, match="resume=never.*checkpoint of step 1"):
        train(experiment, workdir, resume="never")
    with pytest.raises(ValueError, match="resume=must.*no committed checkpoint"):
        train(experiment, tmp_path_factory.mktemp("empty"), resume="must")
    with pytest.raises(ValueError, match="expected one of auto, must, never"):
        train(experiment, workdir, resume="perhaps")


def events(workdir: pathlib.Path, name: str) -> list[dict]:
    """The events of that name in the ledger."""
    lines = (workdir / "ledger.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.mark.slow
def test_a_damaged_step_is_passed_over_aloud_and_nothing_starts_from_scratch(
        halfway, tmp_path, capfd):
    experiment, workdir = halfway
    experiment.train.num_steps = 3
    assert train(experiment, workdir, resume_override=["train.num_steps"]).step == 3
    expected = losses(workdir)
    (damaged, *_) = (workdir / "checkpoints/3/state/ocdbt.process_0/d").iterdir()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        command_line.run(["batiste", "doctor", "checkpoints", f"--workdir={workdir}"])
    printed = capfd.readouterr().out
    assert ended.value.code == 1 and f"step 3: {damaged} has" in printed
    assert "step 2: every file is what was written" in printed
    evaluate(workdir)
    assert f"step 3 is passed over: {damaged} has" in capfd.readouterr().err
    assert train(experiment, workdir, resume="must").step == 3
    assert f"step 3 is passed over: {damaged} has" in capfd.readouterr().err
    assert losses(workdir) == expected
    assert events(workdir, "started")[-1]["step"] == 2
    assert str(damaged) in events(workdir, "started")[-1]["passed_over"]["3"]
    folder = workdir / "checkpoints"
    assert (folder / "3.set_aside_1").is_dir() and (folder / "3").is_dir()

    for step in (2, 3):
        (folder / f"{step}/manifest.json").unlink()
    for mode in ("auto", "must"):
        with pytest.raises(ValueError, match="no checkpoint that verifies: .*3/manifest.json.*2/man"):
            train(experiment, workdir, resume=mode)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="its ledger says that step 3 was saved"):
        train(experiment, workdir)


def test_what_is_meant_may_be_overridden_and_is_written_down(halfway, corpus):
    experiment, workdir = halfway
    experiment.train.schedule.learning_rate *= 2
    with pytest.raises(ValueError, match="resume_override=learning_rate: expected fields"):
        train(experiment, workdir, resume_override=["learning_rate"])
    experiment.train.num_steps = 2
    experiment.train.schedule.warmup_steps = 1
    override = ["train.schedule", "train.num_steps", "data"]
    more = pathlib.Path(corpus).parent / "more.txt"
    more.write_text("one document more")
    try:
        assert train(experiment, workdir, resume_override=override).step == 2
    finally:
        more.unlink()
    changed = " ".join(events(workdir, "started")[-1]["changed"])
    assert "learning_rate was" in changed and "data fingerprint was" in changed
    experiment.model.mlp_dim = 40
    with pytest.raises(ValueError, match=r"array .*params.*was 'float32\[.*\]', is 'float32\["):
        train(experiment, workdir, resume_override=["model", *override])


def test_a_failed_save_is_tried_again_at_the_next_step(corpus, tmp_path, monkeypatch, capfd):
    experiment, report = tiny_experiment(corpus), main._report
    experiment.train.num_steps = 12
    experiment.sample.prompts = ()

    def obstruct(ledger, event, **fields):
        if event == "saved" and fields["step"] == 5:
            (tmp_path / "checkpoints/10.unfinished").write_text("where the next save will go")
        report(ledger, event, **fields)

    monkeypatch.setattr(main, "_report", obstruct)
    assert train(experiment, tmp_path).step == 12
    assert "the checkpoint of step 10 could not be saved: " in capfd.readouterr().err
    (failed,) = events(tmp_path, "save_failed")
    assert failed["step"] == 10 and "File exists" in failed["why"]
    assert 11 in [event["step"] for event in events(tmp_path, "saved")]


@pytest.mark.slow
def test_topology_may_change_and_the_run_remembers_its_config(halfway):
    experiment, workdir = halfway
    experiment.mesh = MeshConfig(data=4, tensor=1, zero=3)
    with pytest.raises(ValueError, match="does not fit the 8 devices"):
        train(experiment, workdir)
    experiment.mesh = MeshConfig(data=8, zero=3)
    experiment.train.num_steps = STEPS
    result = train(experiment, workdir, resume="must")
    assert result.step == STEPS
    measured = evaluate(workdir)
    assert measured.loss == pytest.approx(result.validation.loss, rel=1e-6)
    assert measured.bits_per_byte == pytest.approx(result.validation.bits_per_byte, rel=1e-6)
    pieces = []
    # So hot that some tokens are among the 42 that the tokenizer does not have, and give no text.
    hot = SamplingConfig(temperature=4.0, top_p=None, max_tokens=None)
    texts = generate(workdir, ["1 is ", "20"], hot, on_text=pieces.append)
    assert texts == ["".join(column) for column in zip(*pieces)]


def test_early_stopping_by_patience(corpus, tmp_path):
    experiment = tiny_experiment(corpus)
    experiment.train.stop.patience = 2
    experiment.train.schedule.learning_rate = 1e-12  # Nothing improves by more than rounding.
    experiment.train.optimizer.embedding_multiplier = 0.0
    experiment.train.optimizer.matrix_multiplier = 0.0
    experiment.train.optimizer.vector_multiplier = 0.0
    result = train(experiment, tmp_path)
    assert result.reason == "patience" and result.step == 15
    # The same command trains no further, with a report to make or without.
    assert train(experiment, tmp_path) == result
    without(tmp_path, "finished")
    assert train(experiment, tmp_path) == result
    assert max(record["step"] for record in read_metrics(tmp_path)) == 15


def no_work(*_, **__):
    raise AssertionError("a finished run prepares and initializes nothing")


def without(workdir: pathlib.Path, *names: str) -> None:
    """Removes the events of these names from a ledger."""
    path = workdir / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["event"] not in names))


def test_a_finished_run_says_so_and_does_nothing(halfway, corpus, monkeypatch, capfd):
    experiment, workdir = halfway
    experiment.train.stop.flops = 1.0
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        for name in ("assemble", "_prepare", "check_memory"):
            patch.setattr(main, name, no_work)
        result = train(experiment, workdir)
        assert (result.reason, result.step) == ("done", 1) and result.validation.tokens > 0
        assert "has finished after step 1: its budget is spent; to go on, raise --config.train.stop" in (
            capfd.readouterr().out)
        assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
        for change in ({"num_steps": STEPS + 1}, {"stop": StopConfig()}):  # There is something left to do.
            changed = dataclasses.replace(experiment, train=dataclasses.replace(
                experiment.train, **change))
            with pytest.raises(AssertionError, match="a finished run"):
                train(changed, workdir, resume_override=["train.num_steps"], force=True)
    # Killed after the last save: what is left to do is done, and no step.
    without(workdir, "finished", "end")
    (workdir / "report.md").unlink()
    again = train(experiment, workdir)
    assert again == result and (workdir / "report.md").exists()
    assert [record["step"] for record in read_metrics(workdir) if record["kind"] == "train"] == [1]
    assert f"{events(workdir, 'finished')[-1]['validation']['tokens']}" == f"{result.validation.tokens}"


@pytest.mark.parametrize("step,change,reason", [
    (20, {}, "patience"), (20, {"train.stop.patience": 3}, None),
    (20, {"train.stop.patience": None}, None), (50, {"train.stop.patience": 3}, "done"),
    (50, {"train.stop.patience": 3, "train.num_steps": 60}, None),
    (20, {"train.num_steps": 60}, "patience"), (49, {"train.stop.patience": None}, None),
    (30, {"train.stop.patience": None, "train.stop.flops": 7.0}, None),
])
def test_when_a_run_has_ended(step, change, reason):
    config = {"train.num_steps": 50, "train.batch_size": 8, "train.stop.flops": None,
              "train.stop.patience": 2}
    meta = {"validation": [[5, 2.0], [10, 1.0], [15, 1.5], [20, 1.25]], "config": config,
            "last_step": 50}
    assert why_ended(meta, step, config | change) == reason


@pytest.mark.parametrize("traces", [
    ["metrics.jsonl"], ["report.md"], ["tensorboard"], ["checkpoints/5.set_aside_1"],
    ["checkpoints/5.unfinished"], ["data", "config.json"]])
@pytest.mark.parametrize("mode", ["auto", "never"])
def test_where_a_run_has_left_anything_nothing_starts_from_scratch_in_silence(
        traces, mode, tmp_path):
    for name in traces:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"has left .*{re.escape(traces[-1])}.*to start from scratch, "
                                         "choose another --workdir or remove these"):
        check_mode(mode, Found(None, {}), tmp_path)
    if traces[-1] == "config.json":  # An imported model has one before it is trained.
        (tmp_path / "imported").mkdir()
        check_mode(mode, Found(None, {}), tmp_path)
    (tmp_path / "ledger.jsonl").write_text("")  # It was killed before its first save.
    check_mode(mode, Found(None, {}), tmp_path)


def test_a_config_alone_may_be_trained_by(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    check_mode("auto", Found(None, {}), tmp_path)


def test_records_follow_from_the_batch_sizes():
    sizes = with_batch_size([], 0, 8)
    assert sizes == [[0, 8]] and with_batch_size(sizes, 30, 8) == sizes
    sizes = with_batch_size(with_batch_size(sizes, 30, 16), 40, 8)
    assert sizes == [[0, 8], [30, 16], [40, 8]]
    assert [records_before(sizes, step) for step in (0, 1, 30, 31, 40, 41)] == [
        0, 8, 240, 256, 400, 408]
    # Back to step 20, and on with 4.
    assert with_batch_size(sizes, 20, 4) == [[0, 8], [20, 4]]
    assert batch_sizes_of({"config": {"train.batch_size": 8}}) == [[0, 8]]
    assert with_batch_size(sizes, 0, 4) == [[0, 4]]


@pytest.mark.slow
def test_another_batch_size_goes_on_with_the_next_record_and_so_does_the_one_after(
        halfway, monkeypatch):
    """One step of 8, two of 16, two of 8; statistics of health on, with rows of both numbers."""
    experiment, workdir = halfway
    experiment.train.checkpoint.every = 100
    read, drawn_at = [], order.Order.drawn_at
    monkeypatch.setattr(order.Order, "drawn_at",
                        lambda self, at: (read.append(at.tolist()), drawn_at(self, at))[1])
    begins, override = [8, 40], ["train.batch_size", "train.num_steps", "train.schedule"]
    experiment.train.schedule.warmup_steps = 1
    for rows, steps in ((16, 3), (8, 5)):
        experiment.train.batch_size, experiment.train.num_steps = rows, steps
        read.clear()
        result = train(experiment, workdir, resume_override=override)
        assert (result.reason, result.step) == ("done", steps)
        start = begins.pop(0)
        for number in range(2):  # Threads read ahead, in any order.
            first = start + number * rows
            assert list(range(first, first + rows)) in read
        assert min(map(min, read)) == start
    assert [event["records"] for event in events(workdir, "from")] == [0, 8, 40]
    meta = json.loads((workdir / "checkpoints/5/meta.json").read_text())
    assert meta["batch_sizes"] == [[0, 8], [1, 16], [3, 8]]
    trained = [record for record in read_metrics(workdir) if record["kind"] == "train"]
    assert [record["step"] for record in trained] == [1, 2, 3, 4, 5]
    # Padding is no token.
    assert meta["tokens"] == sum(record["real_tokens"] for record in trained) <= 56 * 32
    assert f" {meta['tokens']:,} tokens," in (workdir / "report.md").read_text()
