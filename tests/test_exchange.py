"""`batiste import` and `batiste export`: nothing is lost either way, and what is wrong is named."""

import copy
import dataclasses
import json
import logging
import pathlib
import re
import shlex
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors import safe_open
from test_data_tokenizer import TEXTS
from test_families import SMALL, torch_twin
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from batiste import command_line, exchange, main
from batiste.configs import encoder_families, families, quickstart
from batiste.configs.experiment import Experiment
from batiste.data import SourceConfig
from batiste.inference import SamplingConfig, generate
from batiste.interop import FAMILIES, chat, files, fitting_family
from batiste.interop import certificate as certificates
from batiste.models import Transformer, TransformerConfig
from batiste.verbs import VERBS

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "families.md").read_text()
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
FIELDS = SMALL | {"vocab_size": 300, "max_position_embeddings": 96, "tie_word_embeddings": True,
                  "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> pathlib.Path:
    """A directory as the hub has it: a small Llama in bfloat16, its tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("published")
    torch_model = torch_twin("LlamaConfig", FIELDS).to(torch.bfloat16)
    torch_model.generation_config.temperature = 0.6
    torch_model.generation_config.do_sample = True
    torch_model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template="<s>{{ messages[0].content }}</s>", **SPECIALS,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    """Two steps on a little text."""
    folder = tmp_path_factory.mktemp("text")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    experiment = Experiment()
    experiment.data.sources = (SourceConfig(path=f"{folder}/*.txt"),)
    experiment.data.sequence_length, experiment.train.batch_size = 24, 8
    experiment.train.num_steps, experiment.train.schedule.warmup_steps = 2, 1
    experiment.mesh.tensor, experiment.mesh.zero = 2, 3
    experiment.train.health.every, experiment.sample.max_tokens = None, 4
    return experiment


@pytest.fixture(scope="module")
def workdir(published, experiment, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("import") / "run"
    main.import_weights(published, workdir, copy.deepcopy(experiment))
    return workdir


@pytest.fixture(scope="module")
def exported(workdir) -> pathlib.Path:
    main.export_weights(workdir, workdir.parent / "exported")
    return workdir.parent / "exported"


def tensors(folder: pathlib.Path) -> dict[str, bytes]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).view(torch.uint8).numpy().tobytes()
                for name in file.keys()}


def test_what_came_in_goes_out(published, exported):
    assert tensors(exported) == tensors(published)
    brought = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
               "chat_template.jinja"}
    assert {path.name for path in exported.iterdir()} == brought | {
        "model.safetensors", "README.md", "certificate.json"}
    for name in brought - {"config.json"}:
        assert (exported / name).read_bytes() == (published / name).read_bytes()
    before, after = (json.loads((folder / "config.json").read_text())
                     for folder in (published, exported))
    assert {key: after[key] for key in before} == before


def test_transformers_loads_it_without_a_message(exported, caplog, capfd):
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        torch_model = transformers.AutoModelForCausalLM.from_pretrained(exported)
        tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    transformers.logging.disable_propagation()
    assert not caplog.records and not capfd.readouterr().err
    assert torch_model.dtype == torch.bfloat16
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "<s>hi</s>"


def test_a_chat_is_the_template_that_came_along(published, workdir, tmp_path, capsys):
    assembly, params = main._load(workdir)
    greedy = SamplingConfig(temperature=0.0, max_tokens=5)
    tokens = [0, *assembly.prepared.tokenizer.encode("def f"), 1]  # Its names of BOS and EOS.
    (expected,) = assembly.write(params, [tokens], greedy)
    flags = ["--temperature=0", "--max_tokens=5", "--chat"]
    with pytest.raises(SystemExit, match="^0$"):
        command_line.run(["batiste", "generate", f"--workdir={workdir}", "--prompt=def f", *flags])
    assert capsys.readouterr().out == f"{expected}\n" != "\n"
    shutil.copytree(workdir, tmp_path / "silent")
    (tmp_path / "silent/imported/files/chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template.*leave --chat out"):
        main.generate(tmp_path / "silent", ["hi"], greedy, chat=True)
    with pytest.raises(ValueError, match="was not imported, so it has no chat template"):
        main.generate(tmp_path, ["hi"], greedy, chat=True)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "time": (ENDLESS, "takes more than 1 s"),
    "size": ("{{ 'x' * 2000000 }}", r"makes 2,000,000 characters: expected at most 1,048,578"),
    "memory": ("{{ 'x' * 9000000000 }}", "takes more than 2 GiB"),
    "refusal": ("{{ raise_exception('only\\nfour roles') }}", "refused the messages: only four roles"),
    "attack": ("{{ ''.__class__.__mro__ }}", "refused the messages: .* unsafe"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_is_somebody_elses_program_and_has_limits(kind, published, tmp_path, monkeypatch):
    template, message = HOSTILE[kind]
    shutil.copytree(published, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(template)
    monkeypatch.setattr(chat, "RENDER_SECONDS", 1)
    with pytest.raises(ValueError, match=message) as refused:
        chat.chat_tokens(tmp_path / "model", [{"role": "user", "content": "hi"}])
    assert "\n" not in str(refused.value)


def test_greedy_decoding_in_bfloat16_is_that_of_transformers_for_64_tokens(exported, workdir):
    """Where it is not, the two likeliest tokens are as likely as bfloat16 can tell."""
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    prompts = [tokenizer(text).input_ids for text in ("def f7(self", "    return", "x")]
    assembly, params = main._load(workdir)
    model = nnx.merge(assembly.program.graphdef, params)
    steps = list(generate(model, prompts, (), SamplingConfig(temperature=0.0, max_tokens=64)))
    likeliest = 0
    for prompt, row in zip(prompts, zip(*steps, strict=True), strict=True):
        with torch.no_grad():
            logits_TV = torch_model(torch.tensor([[*prompt, *row]])).logits[0, len(prompt) - 1:-1]
        chosen_T = logits_TV.gather(1, torch.tensor(row)[:, None])[:, 0]
        best_T = logits_TV.max(dim=1).values
        assert (best_T - chosen_T <= best_T.abs() / 64).all()
        likeliest += int((best_T == chosen_T).sum())
    assert len(row) == 64 and likeliest > 0.95 * 3 * 64
    assert len({token for row in steps for token in row}) > 8, "one token proves little"


def test_training_begins_with_the_imported_weights_and_continues(
        workdir, experiment, exported, tmp_path):
    own = tmp_path / "run"
    shutil.copytree(workdir, own)
    experiment = main.load_experiment(own)
    before = main.evaluate(own)
    experiment.train.schedule.learning_rate = 1e-30
    same = main.train(experiment, own)
    assert same.step == 2
    np.testing.assert_allclose(same.validation.loss, before.loss, rtol=1e-3)
    assert main.train(experiment, own, resume="must").step == 2
    main.export_weights(own, tmp_path / "after")
    assert tensors(tmp_path / "after") == tensors(exported)
    other = copy.deepcopy(experiment)
    other.model.mlp_dim += 8
    shutil.copytree(workdir, tmp_path / "untrained")
    with pytest.raises(ValueError, match="model.mlp_dim was 40, is 48"):
        main.train(other, tmp_path / "untrained")


def test_a_model_that_was_not_imported_finds_its_family(tmp_path):
    config = TransformerConfig(
        vocab_size=37, num_layers=2, model_dim=24, num_heads=4, num_kv_heads=2, head_dim=6,
        mlp_dim=40, max_length=16, bias="qkv")
    model = jax.jit(lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(0)))[1])()
    params = nnx.to_pure_dict(model)
    given = exchange.Export(config, params, tmp_path / "run", None)
    exchange.export_model(given, str(tmp_path / "exported"))
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert type(torch_model).__name__ == "Qwen2ForCausalLM"
    tokens_BT = certificates.probe(37, 16, 37)[0]
    logits_BTV = torch_model(torch.tensor(tokens_BT, dtype=torch.long)).logits.detach().numpy()
    certificate = json.loads((tmp_path / "exported/certificate.json").read_text())
    found = certificates.fingerprint(lambda _: logits_BTV, 37, 16, 37)
    assert certificates.check(certificate, found) < 1e-5
    with pytest.raises(ValueError, match="a llama has no place for model.bias='qkv'"):
        exchange.export_model(given, str(tmp_path / "other"), "llama")


def test_the_model_that_everybody_trains_first_has_a_family():
    assert fitting_family(quickstart.get_config().model, FAMILIES).model_type == "qwen3"


@pytest.mark.parametrize("changes,expected", [
    ({"activation": "relu2"}, "qwen3, which has no place for model.activation='relu2' (its own is 'swiglu')"),
    ({"attention_sinks": True}, "qwen3, which has no place for model.attention_sinks=True"),
    ({"num_experts": 4, "activation": "relu"}, "qwen3_moe, which has no place for model.activation"),
    ({"form": "encoder", "qk_norm": False, "positions": "learned", "norm": "layer", "bias": "all",
      "norm_placement": "post", "activation": "relu2"}, "which has no place for"),
])
def test_a_model_of_no_family_hears_of_the_nearest(changes, expected):
    model = dataclasses.replace(quickstart.get_config().model, **changes)
    with pytest.raises(ValueError, match=f"the nearest is .*{re.escape(expected)}") as refusal:
        fitting_family(model, FAMILIES)
    assert len(re.findall(r"model\.\w+=", str(refusal.value))) <= 6


def test_verification_finds_a_byte_and_a_weight(exported, tmp_path):
    assert exchange.verify_export(str(exported)) < 1e-6
    copied = tmp_path / "copied"
    shutil.copytree(exported, copied)
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 0x40  # The largest bit of the exponent of the last weight.
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors"):
        exchange.verify_export(str(copied))
    fingerprint = json.loads((copied / "certificate.json").read_text())["fingerprint"]
    (copied / "certificate.json").unlink()
    certificates.write(copied, fingerprint)
    with pytest.raises(ValueError, match="these are not the weights that were exported"):
        exchange.verify_export(str(copied))


def changed(key, value):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
    return change


def cut_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


REFUSED = {
    "type": (changed("model_type", "xlm"), "model_type='xlm': expected one of llama, mistral"),
    "activation": (changed("hidden_act", "gelu"), "hidden_act='gelu', but of llama only"),
    "rope": (changed("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}),
             "rope_type='longrope': expected one of default, linear, llama3, yarn"),
    "yarn": (changed("rope_parameters", {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0,
        "original_max_position_embeddings": 16}), "mscale=1.0 of rope_type='yarn': expected none"),
    "size": (changed("intermediate_size", 41),
             r"has shape \(40, 24\), but config.json says \(41, 24\)"),
    "layers": (changed("num_hidden_layers", 4), "the files have no tensor model.layers.3."),
    "fewer": (changed("num_hidden_layers", 2), "tensor model.layers.2.*has no parameter"),
    "cut": (cut_short, "cut short: .* ends at byte"),
    "config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "weights": (lambda folder: (folder / "model.safetensors").unlink(),
                "model.safetensors is missing"),
    "begins": (lambda folder: [changed("bos_token_id", None)(folder),
                               changed("eos_token_id", None)(folder),
                               (folder / "generation_config.json").unlink(),
                               (folder / "tokenizer_config.json").unlink()],
               "bos_token or eos_token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_imported_is_refused_in_one_line(name, published, tmp_path):
    change, message = REFUSED[name]
    shutil.copytree(published, tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(SystemExit) as stopped:
        flags = [f"--from={tmp_path}/model", f"--workdir={tmp_path}/w"]
        command_line.run(["batiste", "import", *flags])
    assert str(stopped.value).startswith("error: ") and "\n" not in str(stopped.value)
    assert re.search(message, str(stopped.value)), stopped.value
    assert not (tmp_path / "w/config.json").exists()


def test_the_commands_of_the_page_do_what_it_says(published, tmp_path, capsys, monkeypatch):
    first, second, third = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SmolLM2-135M").symlink_to(published)
    for command in (first + third).strip().split("\n"):
        with pytest.raises(SystemExit) as stopped:
            command_line.run(shlex.split(command))
        assert not stopped.value.code, stopped.value.code
    assert "29 tensors" in capsys.readouterr().out
    assert len(tensors(tmp_path / "smollm2_again")) == 29
    for command in second.replace("\\\n", " ").strip().split("\n"):
        _, verb, *flags = shlex.split(command)
        command_line._parse(VERBS[verb].define, [f"batiste {verb}", *flags])


def test_the_page_has_every_family():
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.M)[1:] == [each.model_type for each in FAMILIES]
    assert f"sizes of {len(families.MODELS)} published decoders" in PAGE
    assert f"of {len(encoder_families.MODELS)} encoders and encoder-decoders" in PAGE


def test_a_tensor_that_is_not_read_back_is_an_error(workdir, tmp_path, monkeypatch):
    def write_and_damage(folder, *arguments):
        written(folder, *arguments)
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)

    written = files.write
    monkeypatch.setattr(files, "write", write_and_damage)
    with pytest.raises(ValueError, match="was not read back as it was written"):
        main.export_weights(workdir, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
