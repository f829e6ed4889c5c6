"""Imported encoders are tuned and embed texts, from the command line and from Python."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
import transformers
from task_cases import HEADS, letters

from batiste import command_line, main, tuning
from batiste.tasks import HeadConfig, TaskConfig

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abdegko0123456789",
         *(f"##{piece}" for piece in "abdegko0123456789"))
TEXTS = ("ba 12 do", "gogo", "", "de ka 7 be ba " * 9)
CONFIG = '''
from batiste.sharding import MeshConfig
from batiste.tasks import HeadConfig, TaskConfig


def get_config():
    config = TaskConfig(
        encoder="encoder", train_data="train.jsonl", validation_data="validation.jsonl",
        heads=(HeadConfig("letter", "sequence", ("a", "e", "o")),),
        max_length=24, num_steps=2, batch_size=8, mesh=MeshConfig(data=8))
    config.schedule.warmup_steps = 1
    return config
'''


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The work directory of a small BERT that came with a vocab.txt alone, and BERT itself."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=40, max_position_embeddings=32, initializer_range=0.2)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(folder / "bert")
    (folder / "bert/vocab.txt").write_text("\n".join(WORDS) + "\n")
    main.import_weights(folder / "bert", folder / "encoder")
    return folder, model


def run(*arguments: str) -> int:
    """The exit code of one command line."""
    with pytest.raises(SystemExit) as ended:
        command_line.run(["batiste", *arguments])
    return ended.value.code


def test_embeddings_are_means_over_tokens_at_length_1(encoder, capsys, monkeypatch):
    folder, model = encoder
    tokenizer = transformers.BertTokenizer(str(folder / "bert/vocab.txt"))
    rows = tokenizer(list(TEXTS), padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        x_BTD = model(**rows).last_hidden_state
    mask_BT1 = rows["attention_mask"][..., None].float()
    mean_BD = torch.nn.functional.normalize((x_BTD * mask_BT1).sum(1) / mask_BT1.sum(1))
    found_BD = tuning.embedder(folder / "encoder")(TEXTS)
    np.testing.assert_allclose(found_BD, mean_BD.numpy(), atol=1e-5)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS) + "\n"))
    capsys.readouterr()
    assert run("embed", f"--workdir={folder}/encoder") == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    np.testing.assert_allclose(printed, found_BD, atol=1e-5)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS) + "\n"))
    assert run("embed", f"--workdir={folder}/encoder", f"--to={folder}/x.npy") == 0
    np.testing.assert_allclose(np.load(folder / "x.npy"), found_BD, atol=1e-6)


@pytest.mark.slow
def test_a_task_is_tuned_from_the_command_line_and_goes_on(encoder, capsys, monkeypatch):
    folder, _ = encoder
    monkeypatch.chdir(folder)
    (folder / "task.py").write_text(CONFIG)
    for name, seed in (("train", 1), ("validation", 2)):
        lines = (json.dumps({"text": each.text, "labels": each.labels})
                 for each in letters(40, seed))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    command = ("tune", "--config=task.py", "--workdir=tuned")
    assert run(*command) == 0
    shown = capsys.readouterr().out
    rows = {line.split("  ")[0] for line in shown.splitlines()}
    assert {"letter: majority", "letter: bag of words", "letter: tuned"} <= rows
    assert "accuracy" in shown and "f1_macro" in shown
    assert run(*command) == 0
    again = capsys.readouterr().out
    assert "continuing from step 2" in again
    assert again.splitlines()[-4:] == shown.splitlines()[-4:]
    tuned, plain = (tuning.embedder(name)(TEXTS) for name in ("tuned", "encoder"))
    assert 1e-6 < np.abs(tuned - plain).max() < 0.1
    assert "error: the checkpoint is of another run: batch_size was 8, is 16" in run(
        *command, "--config.batch_size=16")


def test_what_a_task_lacks_is_said_in_one_line(encoder, monkeypatch):
    folder, _ = encoder
    monkeypatch.chdir(folder)
    config = TaskConfig(heads=HEADS[:1], max_length=24)
    for change, message in (
        ({}, "encoder=None: expected a work directory"),
        ({"encoder": "nowhere"}, "workdir=nowhere: no config.json there"),
        ({"encoder": "encoder"}, "train_data=None: expected a .jsonl"),
        ({"encoder": "encoder", "train_data": "no.jsonl"}, "no.jsonl: no such file"),
        ({"encoder": "encoder", "train_data": "no.py:x"}, "train_data=no.py: no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            tuning.given_of(dataclasses.replace(config, **change))
    example = ("tune", "--config=examples/which_package.py", "--workdir=x")
    assert "did you mean --config.num_steps?" in run(*example, "--config.num_step=3")
    assert "encoder=None: expected" in run(*example, "--config.encoder=None")
    assert "must return a TaskConfig" in run(
        "tune", "--config=configs/quickstart.py", "--workdir=x")
    assert "must return an Experiment" in run(
        "train", "--config=examples/which_package.py", "--workdir=x")


@pytest.mark.parametrize("form,pool,message", [
    ("decoder", "first", r"heads\[0\].pool='first': the first token of a decoder"),
    ("encoder_decoder", None, "is an encoder_decoder"),
])
def test_models_that_tasks_are_not_proven_for_are_refused(form, pool, message):
    model = dataclasses.replace(main.Experiment().model, form=form)
    config = TaskConfig(heads=(HeadConfig(classes=("a", "b"), pool=pool),))
    with pytest.raises(ValueError, match=message):
        tuning.check_encoder(config, model)
