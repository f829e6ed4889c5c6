"""What --config and the flags of its fields show, take, print and complete; and files that fail."""

import contextlib
import pathlib
import shlex
import subprocess

import pytest

from batiste import command_line
from batiste.completion import script
from batiste.config_overrides import apply, load
from batiste.configs import quickstart
from batiste.configs.experiment import Experiment, flatten
from batiste.config_text import as_python, field_list
from batiste.data import SourceConfig
from batiste.tasks import TaskConfig
from batiste.train.schedule import make_schedule
from batiste.verbs import VERBS

QUICKSTART = "--config=configs/quickstart.py"


@pytest.fixture
def shown(capsys):
    """What a command line that only says something prints; and that it ends with 0."""
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit:
            command_line.run(["batiste", *arguments])
        assert exit.value.code in (0, None)
        return capsys.readouterr().out

    return run


def parsed(*arguments: str):
    """The config that `batiste train` would get."""
    return command_line._parse(VERBS["train"].define, ["batiste train", *arguments]).config


def refused(*arguments: str) -> str:
    with pytest.raises(ValueError) as error:
        parsed(*arguments)
    return str(error.value)


def test_help_with_a_config_lists_every_field_with_its_value_type_and_text(shown):
    text = shown("train", QUICKSTART, "--config.model.num_layers=7", "--help")
    config = quickstart.get_config()
    for name in flatten(config):
        assert f"\n  --config.{name}=" in text, name
    assert "--config.model.num_layers=7  (a whole number)\n      layers of the decoder" in text
    assert "config.train.schedule (ScheduleConfig):" in text
    assert "--config.data.sources[0].path=stdlib  (a string)" in text
    assert "--config=FILE this lists every field" in shown("train", "--help")
    assert "--config=FILE this lists" not in shown("generate", "--help")


def test_every_field_of_a_task_is_listed_too():
    text = field_list(TaskConfig())
    assert all(f"--config.{name}=" in text for name in flatten(TaskConfig()))


@pytest.mark.parametrize("arguments", [
    (QUICKSTART,),
    (QUICKSTART, "--config.data.sources=a.txt,b.jsonl", "--config.data.sources[1].weight=2",
     "--config.train.optimizer.clip_norm=None", "--config.sample.prompts=('a b','c')"),
    ("--config=configs/objectives.py:masked", "--config.model.dtype=float32"),
])
def test_a_printed_config_is_a_config_that_makes_it_again(arguments, shown, tmp_path):
    path = tmp_path / "printed.py"
    path.write_text(shown("train", *arguments, "--print_config"))
    assert parsed(f"--config={path}") == parsed(*arguments)
    assert parsed(f"--config={path}", "--config.model.num_layers=3").model.num_layers == 3


def test_a_printed_task_too(tmp_path):
    path = tmp_path / "printed.py"
    path.write_text(as_python(TaskConfig(), "batiste tune"))
    assert load(str(path)) == TaskConfig()


@pytest.mark.parametrize("arguments,paths,weights", [
    (["--config.data.sources=a.txt"], ["a.txt"], [1]),
    (["--config.data.sources=a.txt,b/*.jsonl"], ["a.txt", "b/*.jsonl"], [1, 1]),
    (["--config.data.sources", "a,b"], ["a", "b"], [1, 1]),
    (["--config.data.sources=('a','b')", "--config.data.sources[1].weight=3"], ["a", "b"], [1, 3]),
    (["--config.data.sources[1].weight=3", "--config.data.sources=a,b"], ["a", "b"], [1, 3]),
    (["--config.data.sources=x", "--config.data.sources=a,b"], ["a", "b"], [1, 1]),
])
def test_sources_are_a_list_of_paths(arguments, paths, weights):
    sources = parsed(QUICKSTART, *arguments).data.sources
    assert sources == tuple(map(SourceConfig, paths, ["text"] * len(paths), map(float, weights)))


def test_the_message_about_a_source_names_the_argument_that_is_wrong():
    line = refused(QUICKSTART, "--config.data.sources[0].path=x", "--config.data.sources[1].path=y")
    assert line.startswith("--config.data.sources[1].path: entries of --config.data.sources")
    assert "--config.data.sources=FIRST,SECOND" in line
    line = refused(QUICKSTART, "--config.data.sources[0].path=x", "--config.data.objectives[0].rate=1")
    assert line.startswith("--config.data.objectives[0].rate: entries of")


@pytest.mark.parametrize("arguments,name,value", [
    (["--config.model.window=None", "--config.model.window=8"], "model.window", 8),
    (["--config.model.window=8", "--config.model.window=None"], "model.window", None),
    (["--config.model.qk_norm=false", "--config.model.qk_norm"], "model.qk_norm", True),
    (["--config.model.qk_norm", "--noconfig.model.qk_norm"], "model.qk_norm", False),
    (["--config.model.num_layers", "3"], "model.num_layers", 3),
    (["--config.train.schedule.warmup_steps=0.25"], "train.schedule.warmup_steps", 0.25),
    (["--config.train.schedule.warmup_steps=25"], "train.schedule.warmup_steps", 25),
    (["--config.train.schedule.decay_steps=0.2"], "train.schedule.decay_steps", 0.2),
    (["--config.train.faults=none"], "train.faults", None),
])
def test_the_last_of_several_counts_and_durations_keep_their_kind(arguments, name, value):
    found = flatten(parsed(QUICKSTART, *arguments))[name]
    assert found == value and type(found) is type(value)


def test_a_field_without_a_config_says_what_is_missing():
    assert refused("--config.model.num_layers=3") == (
        "--config.model.num_layers is a field of --config=FILE, which is left out")


def test_the_quickstart_runs_at_any_length_and_is_what_it_was_at_its_own():
    train = parsed(QUICKSTART, "--config.train.num_steps=50").train
    schedule = make_schedule(train.schedule, train.num_steps)
    assert float(schedule(4)) == pytest.approx(0.012) and float(schedule(3)) < 0.0097
    for steps in (1, 2, 3, 50, 1100, 100_000):
        train.num_steps = steps
        train.validate()
    train = quickstart.get_config().train
    in_fractions, train.schedule.warmup_steps = make_schedule(train.schedule, train.num_steps), 100
    in_steps = make_schedule(train.schedule, train.num_steps)
    assert all(float(in_fractions(step)) == float(in_steps(step)) for step in range(0, 1100, 7))


def test_a_default_config_runs_at_any_length():
    for steps in (1, 5, 50):
        experiment, task = Experiment(), TaskConfig()
        experiment.train.num_steps = task.num_steps = steps
        experiment.validate()
        task.train.validate()


def written(tmp_path, text: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("text,frames,line", [
    ("def get_config(:\n", ["mine.py\", line 1", "^"], "SyntaxError: "),
    ("import no_such_module\n", ["line 1, in <module>", "import no_such_module"],
     "ModuleNotFoundError: No module named 'no_such_module'"),
    ("def get_config():\n    return 1 / 0\n", ["line 2, in get_config", "return 1 / 0"],
     "ZeroDivisionError: division by zero"),
    ("from batiste.configs.quickstart import get_config as quickstart\n\n\n"
     "def get_config():\n    config = quickstart()\n    config.train.num_step = 12\n    return config\n",
     ["line 6, in get_config", "config.train.num_step = 12"],
     "AttributeError: TrainConfig has no field 'num_step'; did you mean 'num_steps'?"),
    ("import json\n\n\ndef get_config():\n    return json.loads('{')\n",
     ["line 5, in get_config"], "JSONDecodeError: "),
    ("raise SystemExit(3)\n", ["line 1, in <module>"], "SystemExit: 3"),
    ("config = 1\n", [], "has no get_config"),
    ("def get_config():\n    pass\n", [], "must return an Experiment, or a TaskConfig, got NoneType"),
    ("\0", [], "mine.py: "),
])
def test_a_config_file_that_fails_shows_its_own_frames_and_one_line(
        text, frames, line, tmp_path, capsys):
    path = written(tmp_path, text)
    with pytest.raises(SystemExit) as exit:
        command_line.run(["batiste", "train", f"--config={path}", "--workdir=x"])
    *before, last = exit.value.code.splitlines()
    assert last.startswith(f"error: config={path}: ") and line in last
    assert all(any(part in said for said in before) for part in frames)
    assert not any("command_line.py" in said or "user_code.py" in said or "fields.py" in said
                   or "decoder.py" in said or "importlib" in said for said in before)
    assert bool(before) == bool(frames) or text == "\0"
    assert capsys.readouterr().err == ""


def test_a_config_file_is_run_anew_each_time(tmp_path):
    make = "from batiste.configs.experiment import Experiment\nget_config = Experiment\nX = {}\n"
    path = written(tmp_path, make.format(1))
    assert load(path) == Experiment()
    path = written(tmp_path, "def get_config():\n    return 1\n")
    assert load(path) == 1


def test_an_error_of_a_preset_is_its_own_line():
    assert refused("--config=configs/families.py:gemma9").startswith(
        "configs/families.py:gemma9: expected one of gpt2_medium, ")


def test_what_is_set_here_is_not_left_to_the_flags():
    config = Experiment()
    argv = ["batiste", "--config.model.window=None", "--workdir=x", "--config.model.num_layers=3"]
    assert apply(config, argv) == ["batiste", "--workdir=x", "--config.model.num_layers=3"]


def test_the_version_says_what_computes(shown):
    text = shown("--version")
    assert text.startswith("batiste 0.1.0 (jax ") and "Python 3." in text


def completed(shell_script: str, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    array = shlex.join(words)
    commands = (f"{shell_script}\nCOMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _batiste; "
                'printf "%s\\n" "${COMPREPLY[@]}"')
    done = subprocess.run(["bash", "-c", commands], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_a_shell_completes_verbs_flags_and_fields():
    bash = script("bash", VERBS)
    assert completed(bash, "batiste", "tr") == ["train"]
    assert set(completed(bash, "batiste", "")) >= {"train", "generate", "doctor", "completion"}
    assert completed(bash, "batiste", "train", "--config.model.num_l") == [
        "--config.model.num_layers="]
    fields = completed(bash, "batiste", "train", "--config.")
    assert set(fields) == {f"--config.{name}=" for name in flatten(Experiment())}
    assert "--config.encoder=" in completed(bash, "batiste", "tune", "--config.")
    assert "--temperature=" in completed(bash, "batiste", "generate", "--t")
    assert completed(bash, "batiste", "generate", "--config") == []
    assert completed(bash, "batiste", "train", "runs/") == []  # The shell completes file names.
    assert script("zsh", VERBS).startswith("autoload -U +X bashcompinit")
    with pytest.raises(ValueError, match="expected one of bash, zsh"):
        script("fish", VERBS)


def test_a_path_of_the_package_is_found_from_anywhere(tmp_path, monkeypatch):
    with contextlib.chdir(tmp_path):
        assert parsed(QUICKSTART) == quickstart.get_config()
    assert pathlib.Path("configs/quickstart.py").is_file()
