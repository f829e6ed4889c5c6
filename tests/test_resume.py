"""Kill it at any moment; the same command continues, bit for bit. Refusals name what differs."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from batiste.configs.experiment import Experiment
from batiste.data import DataConfig, SourceConfig
from batiste.inference import SamplingConfig
from batiste.main import evaluate, generate, load_experiment, train
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig
from batiste.train import Checkpoints
from batiste.train.metrics import read_metrics

STEPS = 30
CONFIG = """
from batiste.configs.experiment import Experiment
from test_resume import tiny_experiment


def get_config(arg=None):
    return tiny_experiment(arg)
"""


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
    assert launch(corpus, workdir).wait() == 0
    return workdir


def child_environment() -> dict[str, str]:
    """Of a process that finds this folder's modules, and what was compiled before."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent),
                                       os.environ.get("PYTHONPATH", "")]),
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(__file__).parents[1] / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }


def launch(corpus: str, workdir: pathlib.Path, *flags: str) -> subprocess.Popen:
    """The real command in a process of its own."""
    config = workdir.parent / f"{workdir.name}_config.py"
    config.write_text(CONFIG)
    command = [sys.executable, "-m", "batiste", "train", f"--config={config}:{corpus}",
               f"--workdir={workdir}", *flags]
    return subprocess.Popen(
        command, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(workdir: pathlib.Path) -> dict[tuple[str, int], float]:
    """Every recorded loss, training and validation, in all its digits."""
    return {(record["kind"], record["step"]): record["loss"] for record in read_metrics(workdir)}


def wait_for_step(workdir: pathlib.Path, step: int, process: subprocess.Popen) -> None:
    """Returns when metrics.jsonl holds a step."""
    while not any(record["step"] >= step for record in read_metrics(workdir)):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


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


def test_sigkill_at_several_moments_then_bit_equal(corpus, uninterrupted, tmp_path):
    for step in (None, 2, 6, 11, 25):
        process = launch(corpus, tmp_path)
        if step is None:
            time.sleep(3)  # While it imports, or prepares, or compiles.
        else:
            wait_for_step(tmp_path, step, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = launch(corpus, tmp_path)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "continuing from step" in output
    assert losses(tmp_path) == losses(uninterrupted)


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_continues(corpus, uninterrupted, tmp_path, number, code):
    process = launch(corpus, tmp_path)
    wait_for_step(tmp_path, 7, process)
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == code, output
    assert "saved; the same command continues" in output
    latest = Checkpoints(tmp_path, load_experiment(tmp_path).train.checkpoint).latest_step
    assert latest is not None and latest > 5
    assert launch(corpus, tmp_path, "--resume=must").wait() == 0
    assert losses(tmp_path) == losses(uninterrupted)


@pytest.fixture
def halfway(corpus, tmp_path) -> tuple[Experiment, pathlib.Path]:
    """An experiment, and a work directory where ten of its steps are done."""
    experiment = tiny_experiment(corpus)
    experiment.train.stop.flops = 1.0  # One step, the least there is.
    experiment.train.checkpoint.every = 1
    assert train(experiment, tmp_path).step == 1
    experiment.train.stop.flops = None
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
        with pytest.raises(ValueError, match="fingerprint of the data was"):
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


def test_what_looks_like_a_checkpoint_is_none(halfway):
    experiment, workdir = halfway
    folder = workdir / "checkpoints"
    (folder / "7").mkdir()  # An empty directory with a later number.
    shutil.copytree(folder / "1", folder / "9")
    (folder / "9" / "commit_success.txt").unlink()  # A copy that lost its marker.
    checkpoints = Checkpoints(workdir, experiment.train.checkpoint)
    assert checkpoints.latest_step == 1
    checkpoints.close()


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
