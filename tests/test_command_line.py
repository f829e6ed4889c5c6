"""What a person can get wrong ends in one line that names the field, and leaves nothing behind."""

import os
import pathlib
import subprocess
import sys

import pytest

from batiste import command_line, fitting, main
from batiste.configs.experiment import Experiment
from batiste.verb_flags import LAUNCHER_COUNTS
from batiste.verbs import VERBS

CONFIG = "--config=configs/quickstart.py"
ROOT = pathlib.Path(__file__).parents[1]
# Arguments after `batiste train CONFIG --workdir=DIR`, and what the line must say.
REFUSED = {
    "--config.model.num_layer=3": ("--config.model.num_layer;", "--config.model.num_layers?"),
    "--config.modle.num_layers=3": ("--config.modle.num_layers;", "--config.model.num_layers?"),
    "--config.learning_rate=1": ("--config.train.schedule.learning_rate?",),
    "--config.model.width=None": ("--config.model.width",),
    "--config.data.sources[1].path=x": (
        "--config.data.sources[1].path: entries", "there are 1; ", "--config.data.sources=FIRST,SECOND"),
    "--config.data.sources[0].pth=x": ("--config.data.sources[0].path?",),
    "--config.model.num_layers=abc": ("--config.model.num_layers=abc", "a whole number"),
    "--config.model.num_layers=2.5": ("--config.model.num_layers=2.5", "a whole number"),
    "--config.data.sources[x].path=y": ("--config.data.sources[x]", "counted from 0"),
    "--config.model.num_layers[0]=3": ("--config.model.num_layers has no entries",),
    "--config.model.layer_pattern[0]=local": ("--config.model.layer_pattern",),
    "--config.train.schedule=linear": ("no single value", "--config.train.schedule.kind"),
    "--config.train.schedule.warmup_steps=slow": ("warmup_steps=slow", "a whole number or"),
    "--config.train.schedule.warmup_steps=1.5": ("warmup_steps", "a fraction of the run below 1"),
    "--config.train.schedule.learning_rate=nan": ("learning_rate=nan", "a finite number"),
    "--config.train.schedule.learning_rate=inf": ("learning_rate=inf", "a finite number"),
    "--config.train.faults=dead_layer:layer=9": ("train.faults='dead_layer:layer=9'", "from 0 to"),
    "--config.train.schedule.learning_rate=fast": ("learning_rate=fast", "expected a number"),
    "--config.train.stop.patience=soon": ("--config.train.stop.patience=soon", "a whole number"),
    "--config.model.qk_norm=maybe": ("--config.model.qk_norm=maybe", "true or false"),
    "--config.model.num_layers=None": ("--config.model.num_layers=None", "cannot be absent"),
    "--config.model.norm=rsm": ("model.norm='rsm'", "did you mean 'rms'?"),
    "--config.model.num_kv_heads=3": ("model.num_kv_heads=3", "model.num_heads=4", "[1, 2, 4]"),
    "--config.model.layer_pattern=local": ("model.window=None", "model.layer_pattern"),
    "--config.model.vocab_size=100": ("model.vocab_size=100", "data.vocab_size=4096"),
    "--config.mesh.data=3": ("mesh (data 3", "8 devices", "mesh.data"),
    "--config.mesh.tensor=3": ("model.num_heads=4", "mesh.tensor=3"),
    "--config.mesh.tensor=8": ("model.num_heads=4", "mesh.tensor=8"),
    "--config.train.batch_size=12": ("train.batch_size=12", "mesh.data=8", "multiple of 8"),
    "--config.train.accumulation=3": ("train.accumulation=3", "train.batch_size=16"),
    "--config.data.sequence_length=999": ("data.sequence_length=999", "model.max_length=256"),
    "--config.mesh.stage=8": ("model.num_layers=4", "mesh.stage=8", "multiple of 8"),
    "--config.train.local.steps=2": ("train.local.steps=2", "mesh.slice=1"),
    "--config.train.schedule.warmup_steps=999": ("train.schedule.warmup_steps", "400"),
    "--config.data.sources[0].path=nowhere/*.txt": ("nowhere/*.txt", "no such file"),
    "--resume=must": ("resume=must", "no committed checkpoint"),
    "--resume=perhaps": ("resume='perhaps'", "auto, must, never"),
    "--num_processes=2": ("num_processes=2", "coordinator_address=None", "give all three"),
    "--process_id=-1": ("--process_id=-1",),
    "--distributed": ("no cluster was detected", "--coordinator_address=HOST:PORT"),
    "--wrkdir=x": ("--wrkdir", "--workdir?"),
    "num_layers=3": ("'num_layers=3'", "--name=value"),
}
# The messages name these, whatever the quickstart is tuned to.
SIZES = ("--config.model.num_heads=4", "--config.model.num_kv_heads=4",
         "--config.train.batch_size=16", "--config.train.num_steps=400")


class Launched(Exception):
    """Raised in place of training."""


@pytest.fixture
def refusal(capsys, tmp_path, monkeypatch):
    """Runs a command line in an empty directory that must refuse it; returns its one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fitting, "fit", lambda *_: pytest.fail("the command was not refused"))

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit:
            command_line.run(["batiste", *arguments])
        # Python itself prints the text that a SystemExit carries, and exits with 1.
        assert isinstance(exit.value.code, str)
        assert capsys.readouterr().err == ""
        line = exit.value.code
        assert line.startswith("error: ") and "\n" not in line
        assert list(tmp_path.iterdir()) == [], "a refused run left something behind"
        return line

    return run


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Runs `batiste train` up to where training would begin; returns the experiment."""
    def train(experiment, *_):
        raise Launched(experiment)

    monkeypatch.setattr(main, "train", train)

    def run(*arguments: str):
        with pytest.raises(Launched) as caught:
            command_line.run(["batiste", "train", CONFIG, f"--workdir={tmp_path}", *arguments])
        caught.value.args[0].validate()
        return caught.value.args[0]

    return run


@pytest.mark.parametrize("argument", REFUSED)
def test_a_wrong_argument_is_one_line_that_names_it(argument, refusal):
    line = refusal("train", CONFIG, *SIZES, "--workdir=runs/x", argument)
    for part in REFUSED[argument]:
        assert part in line, line


@pytest.mark.parametrize("arguments,parts", [
    (("trian",), ("'trian'", "did you mean train?")),
    (("train", CONFIG), ("--workdir",)),
    (("prepare", "--workdir=x"), ("--config",)),
    (("train", "--workdir=x"), ("workdir=x", "config.json")),
    (("train", "--workdir=x", "--config=configs/quickstrat.py"), ("configs/quickstart.py?",)),
    (("train", "--workdir=x", "--config=nothing/like/it.py"), ("known are configs/c4_1b.py",)),
    (("evaluate", "--workdir=x"), ("workdir=x", "no run")),
    (("generate", "--workdir=x", "--prompt=a"), ("workdir=x", "no run")),
    (("generate", "--prompt=a"), ("--workdir",)),
    (("generate", "--workdir=x", "--temperature=-1"), ("--temperature=-1",)),
    (("generate", "--workdir=x", "--promt=a"), ("--prompt?",)),
    (("evaluate", "--workdir=x", CONFIG), ("--config",)),
    (("evaluate", "--workdir=x", "--", "train"), ("'train'", "--name=value")),
    (("report", "--workdir=x"), ("workdir=x", "no ledger.jsonl", "batiste train")),
    (("doctor", "--workdir=x"), ("workdir=x", "no config.json", "batiste train")),
    (("doctor", "checkpoints", "--workdir=x"), ("workdir=x", "no checkpoints", "batiste train")),
    (("supervise",), ("no command", "batiste supervise -- train --workdir=DIR")),
    (("supervise", "--", "train", CONFIG), ("batiste supervise -- train --workdir=DIR",)),
    (("supervise", "--", "evaluate", "--workdir=x"), ("'evaluate --workdir=x'", "-- train")),
    (("supervise", "--retries=-1", "--", "train"), ("--retries=-1",)),
])
def test_a_wrong_command_is_one_line(arguments, parts, refusal):
    line = refusal(*arguments)
    for part in parts:
        assert part in line, line


BY_HAND = ("--coordinator_address=localhost:1", "--num_processes=2", "--process_id=0")


@pytest.mark.parametrize("verb,arguments", [
    ("train", (CONFIG,)), ("evaluate", ()), ("generate", ("--prompt=a",))])
@pytest.mark.parametrize("flags,parts", [
    (BY_HAND[:2], ("process_id=None", "give all three")),
    ((*BY_HAND[:2], "--process_id=2"), ("process_id=2", "num_processes-1=1")),
    (("--coordinator_address=here", *BY_HAND[1:]), ("'here'", "HOST:PORT")),
    (("--coordinator_address=here:70000", *BY_HAND[1:]), ("'here:70000'", "HOST:PORT")),
    ((*BY_HAND, "--distributed"), ("--distributed and --coordinator_address exclude",)),
    ((*BY_HAND, "--nodistributed"), ("--nodistributed and --coordinator_address exclude",)),
    (("--distributed",), ("no cluster was detected", "SLURM", "--process_id=I")),
])
def test_processes_that_cannot_be_joined_are_refused(
    verb, arguments, flags, parts, refusal, monkeypatch
):
    monkeypatch.setattr(main, "load_experiment", lambda workdir, trust_code=False: Experiment())
    line = refusal(verb, *arguments, "--workdir=x", *flags)
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize("variable", LAUNCHER_COUNTS)
def test_several_processes_that_a_launcher_started_are_one_run_or_said_not_to_be(
    variable, launched, monkeypatch
):
    monkeypatch.setenv(variable, "1")
    launched()
    monkeypatch.setenv(variable, "4")
    launched("--nodistributed")
    with pytest.raises(SystemExit) as exit:
        launched()
    for part in (f"{variable}=4", "--distributed", "--nodistributed"):
        assert part in exit.value.code


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_the_flags_and_exits_with_0(verb, capsys):
    with pytest.raises(SystemExit) as exit:
        command_line.run(["batiste", verb, "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert ("--workdir" in shown) == (verb not in ("plan", "supervise"))
    assert ("--topology" in shown) == (verb == "plan")
    assert ("--config" in shown) == (
        verb in ("plan", "prepare", "train", "tune", "import"))
    assert ("--prompt" in shown) == (verb == "generate")
    assert ("--distributed" in shown) == (verb in ("train", "evaluate", "generate"))


@pytest.mark.parametrize("arguments,code", [(["--help"], 0), (["help"], 0), ([], 2)])
def test_help_lists_the_verbs_and_no_verb_is_a_mistake(arguments, code, capsys):
    with pytest.raises(SystemExit) as exit:
        command_line.run(["batiste", *arguments])
    assert exit.value.code == code
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in VERBS)


@pytest.mark.parametrize("arguments,name,value", [
    (["--config.model.num_layers=3"], "model.num_layers", 3),
    (["--config.model.norm_epsilon=1e-3"], "model.norm_epsilon", 1e-3),
    (["--config.model.qk_norm"], "model.qk_norm", True),
    (["--config.model.qk_norm=true"], "model.qk_norm", True),
    (["--config.model.qk_norm=false"], "model.qk_norm", False),
    (["--config.model.tied_embeddings=false"], "model.tied_embeddings", False),
    (["--noconfig.model.tied_embeddings"], "model.tied_embeddings", False),
    (["--config.model.layer_pattern=('local','global')", "--config.model.window=8"],
     "model.layer_pattern", ("local", "global")),
    (["--config.model.window=8", "--config.model.window=None"], "model.window", None),
    (["--config.model.window=None"], "model.window", None),
    (["--config.sample.top_p=None"], "sample.top_p", None),
    (["--config.sample.top_p=0.5"], "sample.top_p", 0.5),
    (["--config.train.optimizer.clip_norm=none"], "train.optimizer.clip_norm", None),
    (["--config.model.remat=full", "--config.model.remat=none"], "model.remat", "none"),
    (["--config.model.positions=none"], "model.positions", "none"),
    (["--config.train.stop.flops=1e15"], "train.stop.flops", 1e15),
    (["--config.mesh.data=4"], "mesh.data", 4),
    (["--config.sample.prompts=('a b','c')"], "sample.prompts", ("a b", "c")),
    (["--config.sample.prompts=abc"], "sample.prompts", ("abc",)),
])
def test_a_flag_sets_a_field_of_its_type(arguments, name, value, launched):
    field = launched(*arguments)
    for part in name.split("."):
        field = getattr(field, part)
    assert field == value and type(field) is type(value)


def test_a_flag_reaches_into_a_tuple_of_configs(launched):
    (source,) = launched("--config.data.sources[0].path=a/*.txt",
                         "--config.data.sources[0].weight=2").data.sources
    assert (source.path, source.weight) == ("a/*.txt", 2.0)


def in_a_process(tmp_path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    return subprocess.run([sys.executable, "-m", "batiste", *arguments], cwd=tmp_path,
                          env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("argument,part", [
    ("--config.model.num_kv_heads=3", "model.num_kv_heads=3 must divide"),
    ("--resume=must", "no committed checkpoint"),
])
def test_a_refused_process_ends_with_its_line_and_1(argument, part, tmp_path):
    ended = in_a_process(tmp_path, "train", CONFIG, "--workdir=x", argument)
    assert ended.returncode == 1 and ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ") and part in line
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_the_persons_mistake_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(main, "load_experiment", lambda workdir, trust_code=False: int("a defect"))
    with pytest.raises(ValueError, match="invalid literal"):
        command_line.run(["batiste", "train", f"--workdir={tmp_path}"])
