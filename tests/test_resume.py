"""What a resume finds, refuses by name, passes over, and may override; test_chaos.py kills."""

import json
import pathlib
import shutil

import pytest

from batiste import command_line, main
from batiste.configs.experiment import Experiment
from batiste.data import DataConfig, SourceConfig
from batiste.inference import SamplingConfig
from batiste.main import evaluate, generate, train
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig
from batiste.train.metrics import read_metrics

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
