"""Where documents begin and end, with the tokenizers of published models: from file to loss and back."""

import copy
import json

import numpy as np
import pytest
import tiny_directories
import torch
import transformers

from batiste import main
from batiste.configs.experiment import Experiment
from batiste.data import Loader, RecordObjective, SourceConfig, pack_tokenizer, transform_of
from batiste.data.huggingface_tokenizer import HuggingFaceTokenizer
from batiste.data.packing import concatenate
from batiste.inference import SamplingConfig

transformers.logging.disable_progress_bar()
TEXTS = tiny_directories.TEXTS
DECODERS, TWO_STACKS = ("gpt2", "qwen2", "llama3"), ("codet5", "bart")
GREEDY = SamplingConfig(temperature=0.0, top_p=None, max_tokens=24)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Each kind's directory, its model of `transformers`, and the work directory of its import."""
    folder, made = tmp_path_factory.mktemp("tiny"), {}
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def get(kind):
        if kind not in made:
            model = tiny_directories.write_directory(kind, folder / kind)
            experiment = Experiment()
            experiment.data.sources = (SourceConfig(str(folder / "corpus.jsonl")),)
            experiment.data.sequence_length, experiment.train.batch_size = 48, 8
            experiment.train.health.every = None
            if kind in TWO_STACKS:
                experiment.data.objectives = (RecordObjective("denoise"),)
            main.import_weights(folder / kind, folder / f"{kind} run", experiment)
            made[kind] = folder / kind, model, folder / f"{kind} run"
        return made[kind]
    return get


def tokenizer_of(tiny, kind) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(pack_tokenizer(tiny(kind)[0]))


@pytest.mark.parametrize("packing", ("concatenate", "first_fit"))
@pytest.mark.parametrize("kind", DECODERS)
def test_every_documents_end_is_learned(tiny, kind, packing):
    _, _, workdir = tiny(kind)
    experiment = main.load_experiment(workdir)
    experiment.data.packing = packing
    prepared = main.prepare(experiment, workdir)
    ends = transformers.PreTrainedTokenizerFast.from_pretrained(tiny(kind)[0]).eos_token_id
    for split in ("train", "validation"):
        batches = list(Loader(prepared, split, 8, 0).epoch_batches())
        targets = np.concatenate([each.targets_BT[each.weights_BT == 1] for each in batches])
        documents = prepared.manifest[split]["documents"]
        assert (targets == ends).sum() == documents > 0
        assert len(targets) == prepared.manifest[split]["tokens"]
        texts = prepared.tokenizer.decode(targets[targets != ends].tolist())
        assert len(texts.encode()) == prepared.num_bytes(split)


@pytest.mark.parametrize("kind", (*DECODERS, *TWO_STACKS))
def test_ids_are_those_of_transformers(tiny, kind):
    tokenizer, theirs = tokenizer_of(tiny, kind), transformers.PreTrainedTokenizerFast.from_pretrained(
        tiny(kind)[0])
    text = "return 5, 'so on'"
    assert theirs(text)["input_ids"] == [
        *tokenizer.source_begin_ids, *tokenizer.encode(text), *tokenizer.source_end_ids]
    assert tokenizer.end_id == theirs.eos_token_id in tokenizer.stop_ids
    for name in tokenizer.special:  # A text that looks like a special token is text.
        assert not {tokenizer.bos_id, *tokenizer.stop_ids} & {*tokenizer.encode(f"a{name}b")}


def generated(model, tokenizer, prompts) -> list[str]:
    """What `transformers` writes of each prompt, greedily, without its special tokens."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            forced = model.generation_config.forced_bos_token_id is not None
            count = GREEDY.max_tokens + forced  # They count it, we do not.
            row = model.generate(ids, max_new_tokens=count, do_sample=False)[0]
        row = row if model.config.is_encoder_decoder else row[ids.shape[1]:]
        texts.append(tokenizer.decode(row, skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("kind", (*DECODERS, *TWO_STACKS))
def test_generating_is_what_transformers_does(tiny, kind):
    folder, model, workdir = tiny(kind)
    prompts = ["document 12 of", "return"]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assembly, params = main._load(workdir)
    ours = assembly.write(params, prompts, GREEDY)
    assert ours == generated(model, theirs, prompts) and len(set(ours)) == 2


def test_each_end_of_a_list_stops_and_travels(tiny, tmp_path):
    """Wherever it is listed: in config.json, or in generation_config.json as Gemma 3 has 1 and 106."""
    folder, model, workdir = tiny("llama3")
    assembly, params = main._load(workdir)
    tokenizer = assembly.prepared.tokenizer
    ids = [*tokenizer.begin_ids, *tokenizer.encode("document 12 of")]
    (text,) = assembly.write(params, [ids], GREEDY)
    stop = tokenizer.encode(text)[3]
    changed = json.loads((folder / "generation_config.json").read_text()) | {
        "eos_token_id": [1, stop, 2]}
    files = workdir.parent / "several"
    tiny_directories.write_directory("llama3", files)
    (files / "generation_config.json").write_text(json.dumps(changed))
    main.import_weights(files, tmp_path / "run", copy.deepcopy(assembly.experiment))
    other, params = main._load(tmp_path / "run")
    assert set(other.prepared.tokenizer.stop_ids) == {1, 2, stop}
    model.generation_config.eos_token_id = [1, stop, 2]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    expected = generated(model, theirs, ["document 12 of"])
    assert theirs.convert_ids_to_tokens(stop) and len(expected[0]) < len(text)
    assert other.write(params, [ids], GREEDY)[0] == tokenizer.decode(
        theirs(expected[0], add_special_tokens=False)["input_ids"][:-1])
    for family in (None, "mistral"):
        main.export_weights(tmp_path / "run", tmp_path / f"{family}", family)
        out = (tmp_path / f"{family}/generation_config.json").read_text()
        assert json.loads(out) == changed
        again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / f"{family}")
        assert again("a") == theirs("a")


def test_a_sources_special_tokens_and_a_targets_first_are_the_familys(tiny):
    """Rows of training are what `transformers` makes of the text and of its labels."""
    texts = TEXTS[:40]
    for kind in TWO_STACKS:
        tokenizer = tokenizer_of(tiny, kind)
        data = main.load_experiment(tiny(kind)[2]).data
        data.objectives, data.sequence_length = (RecordObjective("denoise", rate=1e-9),), 160
        documents = [np.array(ids, np.int32) for ids in tokenizer.encode_batch(texts)]
        records = np.stack(list(concatenate(documents, 160, tokenizer)))
        numbers = np.arange(len(records))
        batch = transform_of(data, "encoder_decoder", tokenizer)(records, numbers, numbers)
        start, whole = tokenizer.start_ids[0], 0
        for row in range(len(records)):
            for segment in range(1, batch.segments_BT[row].max() + 1):
                inside = batch.segments_BT[row] == segment
                labels = batch.targets_BT[row][inside].tolist()
                own = batch.source_segments_BS[row] == segment
                read = batch.source_tokens_BS[row][own].tolist()
                assert read[0] == labels[0] == 0 and read[-1] == labels[-1] == 2
                assert batch.tokens_BT[row][inside].tolist() == [start, *labels[:-1]]
                assert batch.weights_BT[row][inside].all()
                whole += tokenizer.decode(labels) in texts and read == labels
        assert whole > 20


@pytest.mark.parametrize("form,objective", (
    ("decoder", "middle"), ("decoder", "prefix"), ("encoder", "masked")))
def test_objectives_know_two_boundaries(tiny, form, objective):
    """An end is learned but where an objective does not predict, and no document is lost."""
    tokenizer = tokenizer_of(tiny, "codet5")
    data = main.load_experiment(tiny("codet5")[2]).data
    data.sequence_length = 160
    data.objectives = (RecordObjective(objective, rate=0.9 if objective == "middle" else 0.15),)
    documents = [np.array(ids, np.int32) for ids in tokenizer.encode_batch(TEXTS)]
    records = np.stack(list(concatenate(documents, 160, tokenizer)))
    numbers = np.arange(len(records))
    batch = transform_of(data, form, tokenizer)(records, numbers, numbers)
    weighted = batch.targets_BT[batch.weights_BT > 0]
    if form == "encoder":
        assert not np.isin(weighted, (0, 2)).any() and len(weighted)
        ends = batch.tokens_BT == 2  # Also the last of a row belongs to its document.
        assert (batch.segments_BT[ends] > 0).all() and ends.sum() > 100
        return
    cut = sum(row[-1] not in (0, 2, -1) for row in records) if objective == "middle" else 0
    assert len(TEXTS) <= (weighted == 2).sum() <= len(TEXTS) + cut
    assert not (weighted == 0).any()
