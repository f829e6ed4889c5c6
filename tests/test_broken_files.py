"""Whatever is wrong with a run's own files ends in one line that names the file, never in a traceback.

config.json, metrics.jsonl and ledger.jsonl of one small directory are cut, mistyped and edited, one
place at a time, and given to everything that reads them without a device.
"""

import copy
import dataclasses
import io
import json
import os
import random
import subprocess
import sys

import pytest

from batiste import command_line, main
from batiste.configs.experiment import Experiment
from batiste.data import (
    DataConfig, SourceConfig, hash_files, load_prepared, prepare, read_signed, write_signed,
)
from batiste.data.printable import printable
from batiste.train import manifest
from batiste.train.account import read_account
from batiste.train.diagnosis import diagnose
from batiste.train.ledger import last_saved, read_ledger
from batiste.train.metrics import read_all
from batiste.train.report import ReportFacts, write_report
from batiste.train.run_data import read_run
from batiste.verbs import say_text

MUTATIONS = 100
CONFIG, METRICS, LEDGER = "config.json", "metrics.jsonl", "ledger.jsonl"
STRANGE = (None, True, -1, 0, 10**30, 1e300, "", "3", "x" * 200, "\x1b[31m", [], [1], [[]], {},
           {"a": 1}, [None], "nan")


def health(step: int) -> dict:
    """A health record of two layers and three rows."""
    norms = {"layers/up_DF": [1.0 + step / 90, 2.0], "norm_D": 0.5}
    return {
        "step": step, "kind": "health", "loss": 3.0 - step / 50, "gradient_norm": 1.0,
        "learning_rate": 1e-3, "seconds": 0.1, "wait": 0.01, "gradient": norms,
        "parameter": norms, "update": norms, "rms": [1.0, 1.1], "largest": [3.0, 4.0],
        "dead": [0.0, 0.1], "row_loss": [3.0, 2.9, 3.1], "row_checksum": [step, step + 1, step + 2],
    }


def events() -> list[dict]:
    finding = {"kind": "loss_spike", "step": 4, "layer": None, "parameter": None, "examples": [1],
               "evidence": {"loss": 3.0}, "cause": "c", "remedy": "r", "policy": "log"}
    listed = [
        ("start", dict(boot="b", pid=7, alive=None)), ("run", dict(devices="cpu")),
        ("started", dict(step=0, passed_over={}, changed=[])), ("from", dict(step=0, reached=0)),
        ("first step", dict(step=1)),
        ("phase", dict(seconds={"step": 1.0}, step=5, next="save blocked")),
        ("saved", dict(step=5)), ("finding", finding),
        ("decision", dict(action="roll_back", kind="loss_spike", step=5, to=2,
                          skip_records=[4, 8], since=None)),
        ("exit", dict(pid=7, what="killed")), ("end", dict(reason="done")),
    ]
    return [{"time": 1e9 + number, "clock": 10.0 + number, "event": name, **fields}
            for number, (name, fields) in enumerate(listed)]


def contents() -> dict[str, list]:
    """The files, as lists of what is on a line each (config.json has one)."""
    experiment = Experiment()
    experiment.train.health.window = 16
    records = [record for step in range(1, 25) for record in (
        {"step": step, "kind": "train", "loss": 3.0, "learning_rate": 1e-3}, health(step))]
    records.append({"step": 24, "kind": "validation", "loss": 2.5})
    return {CONFIG: [dataclasses.asdict(experiment)], METRICS: records, LEDGER: events()}


RIGHT = contents()


def write(workdir, files: dict[str, list]) -> None:
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (workdir / name).write_text(text)


def parents(value) -> list[tuple]:
    """Every place in a value of JSON: its container and key."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return [place for key, each in pairs for place in (
        (value, key), *(parents(each) if isinstance(each, (dict, list)) else ()))]


def edited(draw: random.Random) -> tuple[str, list, str]:
    """A file with one place of one line edited: its name, lines, and what was done."""
    files = copy.deepcopy(RIGHT)
    name = draw.choice((CONFIG, METRICS, LEDGER))
    line = draw.choice(files[name])
    holder, key = draw.choice(parents(line))
    if draw.random() < 0.2:
        del holder[key]
        return name, files[name], f"{key} deleted"
    value = draw.choice(STRANGE)
    holder[key] = value
    return name, files[name], f"{key}={value!r}"


def damaged(draw: random.Random, text: bytes) -> bytes:
    """The bytes of a file cut, flipped or doubled."""
    at = draw.randrange(len(text))
    return draw.choice((
        text[:at], b"", text[:at] + bytes([draw.randrange(256)]) + text[at + 1:],
        text + text[at:], text[:at] + b"\n" + text[at:], b"[" * 5000, b"null\n", b"\xff\xfe" + text))


READERS = {
    CONFIG: (main.load_experiment, diagnose, read_run),
    METRICS: (read_all, diagnose, read_run),
    LEDGER: (read_ledger, read_account, last_saved, diagnose, read_run),
}


def read_everything(workdir, *names: str) -> list[str]:
    """One line for each reader of these files that refuses; fails where one does otherwise."""
    lines = []
    for read in (reader for name in names for reader in READERS[name]):
        try:
            read(workdir)
        except Exception as error:
            line = command_line._line(error)
            if line is None:
                raise
            lines.append(line)
    return lines


@pytest.fixture
def workdir(tmp_path):
    write(tmp_path, contents())
    assert read_everything(tmp_path, *READERS) == []
    assert len(diagnose(tmp_path)) >= 1 and len(read_ledger(tmp_path)) == len(events())
    return tmp_path


def test_a_place_of_another_type_is_one_line(workdir):
    draw, refused = random.Random(11), 0
    for _ in range(MUTATIONS):
        name, lines, what = edited(draw)
        right = (workdir / name).read_bytes()
        write(workdir, {name: lines})
        try:
            said = read_everything(workdir, name)
        except Exception as error:
            raise AssertionError(f"{name}: {what}: {error!r}") from error
        assert all("\n" not in line and printable(line) == line for line in said)
        assert all(name in line or "train." in line for line in said), (what, said)
        refused += bool(said)
        (workdir / name).write_bytes(right)
    assert refused > MUTATIONS / 2


def test_damaged_bytes_are_one_line(workdir):
    draw = random.Random(1)
    for number in range(MUTATIONS // 4):
        name = (CONFIG, METRICS, LEDGER)[number % 3]
        right = (workdir / name).read_bytes()
        (workdir / name).write_bytes(damaged(draw, right))
        for line in read_everything(workdir, name):
            assert "\n" not in line and str(workdir) in line
        (workdir / name).write_bytes(right)


def test_signed_manifests_that_lie_are_one_line(tmp_path):
    """With a digest that is right: not what a disk does, but what a stranger's directory may hold."""
    (tmp_path / "text.jsonl").write_text("".join(
        json.dumps({"text": f"text number {i} " * 9}) + "\n" for i in range(40)))
    config = DataConfig(sources=(SourceConfig(f"{tmp_path}/text.jsonl"),), tokenizer="bytes",
                        sequence_length=16, validation_fraction=0.3)
    prepared = prepare(config, tmp_path / "data").directory
    step = tmp_path / "1"
    step.mkdir()
    (step / "meta.json").write_text("{}")
    write_signed(step / "manifest.json", {"step": 1, "files": hash_files(step)})
    draw, refused = random.Random(5), 0
    for path, read in ((prepared / "manifest.json", lambda: load_prepared(prepared)),
                       (step / "manifest.json", lambda: manifest.problem(tmp_path, 1))):
        right = read_signed(path)
        for _ in range(MUTATIONS // 2):
            value = copy.deepcopy(right)
            holder, key = draw.choice(parents(value))
            holder[key] = draw.choice(STRANGE)
            write_signed(path, value)
            try:
                refused += isinstance(read(), str)
            except ValueError as error:
                line = command_line._line(error)
                assert line is not None and "\n" not in line, (holder, key)
                refused += 1
        write_signed(path, right)
        assert not isinstance(read(), str)
    assert refused > MUTATIONS / 4


def test_a_mistyped_field_of_the_config_is_named_with_its_file(workdir):
    config = contents()[CONFIG][0]
    config["model"]["num_layers"] = "3"
    write(workdir, {CONFIG: [config]})
    with pytest.raises(ValueError, match=r"config.json: model.num_layers='3': expected a whole num"):
        main.load_experiment(workdir)
    config["model"] = 3
    write(workdir, {CONFIG: [config]})
    with pytest.raises(ValueError, match=r"config.json: model=3: expected the fields of a Transf"):
        main.load_experiment(workdir)


@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_a_file_where_a_directory_belongs_is_one_line(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("run")
    (tmp_path / "run" / "data").write_text("a file")
    (tmp_path / "a.txt").write_text("some words " * 50)
    with pytest.raises(SystemExit) as exit:
        command_line.run(["batiste", verb, "--config=configs/quickstart.py", "--workdir=run",
                          "--config.train.batch_size=8", "--config.data.sources=a.txt"])
    line = exit.value.code
    assert line.startswith("error: ") and "run/data" in line and "a directory is needed" in line


@pytest.mark.parametrize("flag", ["--temperature=nan", "--temperature=inf", "--top_p=nan",
                                  "--top_p=-0.5", "--top_p=1.5"])
def test_a_number_that_is_none_is_refused_before_anything_is_loaded(flag, workdir):
    with pytest.raises(SystemExit) as exit:
        command_line.run(["batiste", "generate", f"--workdir={workdir}", "--prompt=a", flag])
    assert exit.value.code.startswith(f"error: {flag.split('=')[0]}=") and "expected" in exit.value.code


def test_a_decoder_has_no_embeddings_of_texts(workdir, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a text\n"))
    with pytest.raises(SystemExit) as exit:
        command_line.run(["batiste", "embed", f"--workdir={workdir}"])
    assert "its model is of form 'decoder'; expected an encoder" in exit.value.code


def test_arguments_that_are_not_utf8_are_one_line(workdir):
    for arguments in (["--prompt=caf\udce9"], ["--prompt", "\udcff"]):
        with pytest.raises(SystemExit) as exit:
            command_line.run(["batiste", "generate", f"--workdir={workdir}", *arguments])
        assert "is not UTF-8" in exit.value.code and exit.value.code.isprintable()


def test_a_backend_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    code = compile("assert None is not None", os.path.join("lib", "jax", "_src", "xla_bridge.py"),
                   "exec")
    try:
        exec(code)
    except AssertionError as error:
        line = command_line._line(error)
        assert "JAX_PLATFORMS=cuda" in line and "pip install 'batiste[cuda]'" in line
        monkeypatch.delenv("JAX_PLATFORMS")
        assert command_line._line(error) is None


@pytest.mark.slow
@pytest.mark.parametrize("arguments,code", [(["--version"], 141), (["train", "--help"], 141)])
def test_a_pipe_that_closes_ends_quietly(arguments, code, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "batiste", *arguments], stdout=writer,
                          stderr=subprocess.PIPE, text=True, env=os.environ | {
                              "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})
    os.close(writer)
    assert (done.returncode, done.stderr) == (code, "")


class Terminal(io.StringIO):
    """A standard output that is a terminal."""

    def isatty(self) -> bool:
        """True."""
        return True


def test_control_codes_reach_files_and_no_terminal(monkeypatch):
    text = "a\x1b[31mb\tc\n\x9b\x00\r\x7f\u202eé\n"
    for stream, expected in ((io.StringIO(), text), (
            Terminal(), "a\\x1b[31mb\tc\n\\x9b\\x00\\x0d\\x7f\\u202eé\n")):
        monkeypatch.setattr("sys.stdout", stream)
        say_text(text)
        assert stream.getvalue() == expected
    assert printable(expected) == expected


def test_a_report_has_no_control_codes_of_its_samples(workdir):
    facts = ReportFacts("\x1b[2J", 1, 1, "cpu", {"sample.prompts": ["\x1b[31m"]}, {"step": 1.0},
                        [("\x1b]0;title\x07", "text\x1b[0m")])
    text = write_report(workdir, facts).read_text()
    assert "\x1b" not in text and "\x07" not in text and "\\x1b]0;title\\x07" in text


def test_an_error_has_no_control_codes(monkeypatch):
    with pytest.raises(SystemExit) as exit:
        command_line.run(["batiste", "evaluate", "--workdir=x\x1b[31m"])
    assert "workdir=x\\x1b[31m: no config.json" in exit.value.code
