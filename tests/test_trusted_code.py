"""A work directory from elsewhere runs no code unasked; one that was made here does."""

import dataclasses
import json
import pathlib
import shutil

import pytest

from batiste import command_line, main
from batiste.configs import trusted_code
from batiste.configs.experiment import Experiment
from batiste.configs.trusted_code import check_code, remember_code, state_folder
from batiste.models import TransformerConfig
from batiste.verbs import VERBS

CODE = """import pathlib
import jax
from batiste.models.parts import Activation

pathlib.Path({mark!r}).write_text("it ran")
SNAKE = Activation(jax.nn.silu)
"""
READING = ("evaluate", "generate", "export", "embed", "train", "doctor", "report")


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    """A user's state folder of the test's own, and a process that remembers nothing."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(trusted_code, "_REMEMBERED", set())


@pytest.fixture
def downloaded(tmp_path) -> tuple[pathlib.Path, pathlib.Path]:
    """A directory whose config names code beside it, and the file that the code would write."""
    workdir, mark = tmp_path / "downloaded", tmp_path / "mark"
    workdir.mkdir()
    (workdir / "x.py").write_text(CODE.format(mark=str(mark)))
    experiment = Experiment(TransformerConfig(activation=f"{workdir}/x.py:SNAKE"))
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(experiment)))
    return workdir, mark


def ended(*arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        command_line.run(["batiste", *arguments])
    return str(exit.value.code)


@pytest.mark.parametrize("verb", READING)
def test_no_verb_runs_the_code_of_a_directory_that_came_from_elsewhere(
        verb, downloaded, monkeypatch, tmp_path):
    workdir, mark = downloaded
    monkeypatch.setattr("sys.stdin.read", lambda: "a text\n", raising=False)
    flags = {"export": (f"--to={tmp_path}/to",), "generate": ("--prompt=a",)}.get(verb, ())
    line = ended(verb, f"--workdir={workdir}", *flags)
    assert not mark.exists()
    if verb not in ("doctor", "report"):
        assert line.startswith("error: ") and "\n" not in line
        assert "x.py" in line and "--trust_code" in line and str(workdir) in line


def test_every_verb_that_reads_a_work_directory_has_the_flag():
    for verb in set(READING) - {"doctor", "report"} | {"tune"}:
        values = command_line._parse(VERBS[verb].define, [f"batiste {verb}", "--trust_code"])
        assert values.trust_code


def test_with_the_flag_it_runs_then_and_later_until_it_changes(downloaded):
    workdir, mark = downloaded
    line = ended("evaluate", f"--workdir={workdir}", "--trust_code")
    assert mark.exists() and "trust_code" not in line  # There is no checkpoint to evaluate.
    main.load_experiment(workdir)
    (workdir / "x.py").write_text("BAD = 1\n")
    with pytest.raises(ValueError, match="or has changed: read it, then add --trust_code"):
        main.load_experiment(workdir)


def test_what_is_trusted_is_a_directory_with_a_code_and_lies_outside_of_it(downloaded, tmp_path):
    workdir, _ = downloaded
    experiment = Experiment(TransformerConfig(activation=f"{workdir}/x.py:SNAKE"))
    remember_code(workdir, experiment)
    check_code(workdir, experiment)
    check_code(f"{workdir}/../downloaded", experiment)
    shutil.copytree(workdir, tmp_path / "copy")
    with pytest.raises(ValueError, match="copy: its config.json runs"):
        check_code(tmp_path / "copy", experiment)
    assert workdir not in state_folder().parents and len(list(state_folder().iterdir())) == 1


def test_a_state_folder_that_cannot_be_written_is_said_and_stops_nothing(
        downloaded, tmp_path, capsys):
    workdir, _ = downloaded
    (tmp_path / "state").write_text("a file")
    experiment = Experiment(TransformerConfig(activation=f"{workdir}/x.py:SNAKE"))
    remember_code(workdir, experiment)
    assert "later commands on" in capsys.readouterr().err
    check_code(workdir, experiment)  # This process was told.


def test_code_that_a_program_names_itself_needs_nothing(downloaded):
    workdir, mark = downloaded
    Experiment(TransformerConfig(activation=f"{workdir}/x.py:SNAKE")).validate()
    assert mark.exists()


def test_code_that_fails_shows_its_own_frames(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import jax\n\nSNAKE = jax.no_such_name\n")
    with pytest.raises(ValueError, match=r"model.activation=.*x.py: AttributeError: ") as error:
        Experiment(TransformerConfig(activation=f"{path}:SNAKE")).validate()
    (frames,) = error.value.__notes__
    assert "SNAKE = jax.no_such_name" in frames and "site-packages" not in frames
