"""Files of other libraries that are damaged, or made to harm: read, or refused in one line.

Each mutation is of one file of a small real model. Nothing else may happen: no other exception, no
hang, no memory beyond a bound.
"""

import collections
import functools
import json
import pathlib
import random
import shutil

import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from mutations import mutate_bytes, mutate_json, outcome
from test_data_tokenizer import TEXTS
from test_families import CASES as DECODERS
from test_families import torch_twin
from test_vocabulary_files import sentencepiece_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from batiste.data import PackedReader, can_pack, load_tokenizer, pack_tokenizer
from batiste.interop import FAMILIES, WeightMap, family_of
from batiste.interop.directory import open_source
from batiste.models import Transformer, TransformerConfig

FEW, MANY = 20, 100  # Mutations of each kind of file: in all 300, and 1,500.
KINDS = ("config", "config of experts", "config of two", "index", "header", "weights", "gguf",
         "gguf's numbers", "tokenizer", "tokenizer settings", "special tokens", "generation",
         "vocabulary", "sentencepiece", "merges")


@functools.lru_cache(maxsize=None)
def _abstract(described: str) -> dict:
    config = eval(described, {"TransformerConfig": TransformerConfig})
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def read_model(path: pathlib.Path, scratch: pathlib.Path) -> None:
    """All that an import reads, but for the copies on devices."""
    shutil.rmtree(scratch, ignore_errors=True)
    opened = open_source(path)
    family = family_of(opened.theirs, FAMILIES)
    config = family.model_of(opened.theirs)
    weights = WeightMap(family, config, opened.theirs, _abstract(repr(config)))
    weights.check(opened.tensors)
    for row in weights.rows:
        weights.sizes(row)
    for name in opened.tensors.entries:
        if opened.tensors.entries[name].dtype is not None:
            np.asarray(opened.tensors.read(name)).sum()
    if can_pack(opened.bring(scratch)):
        packed = pack_tokenizer(scratch)
        if config.form != "decoder":
            PackedReader(packed).read("abc d", None, 16, False)
            return
        (scratch / "packed.json").write_bytes(packed)
        tokenizer = load_tokenizer(scratch / "packed.json")
        tokenizer.decode(tokenizer.encode("def f(x): return 1"))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Small models as the hub has them, by what of them is damaged."""
    root = tmp_path_factory.mktemp("published")
    for name in ("gemma3", "deepseek"):
        torch_twin(*DECODERS[name]).save_pretrained(root / name, max_shard_size="20KB")
    fields = DECODERS["llama"][1] | {"vocab_size": 300}
    torch_twin("LlamaConfig", fields).save_pretrained(root / "llama")
    t5 = transformers.T5Config(vocab_size=37, d_model=24, d_kv=10, d_ff=40, num_layers=2, num_heads=3)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(root / "t5")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
    ).save_pretrained(root / "llama")
    (root / "llama/special_tokens_map.json").write_text(json.dumps(
        {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}))
    torch.manual_seed(0)
    bert = transformers.BertConfig(vocab_size=37, hidden_size=24, num_hidden_layers=1,
                                   num_attention_heads=4, intermediate_size=40)
    transformers.BertForMaskedLM(bert).save_pretrained(root / "bert")
    (root / "bert/vocab.txt").write_text("\n".join(
        ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", "##a", "##b")))
    for name in ("merged", "pieces"):
        shutil.copytree(root / "llama", root / name, ignore=lambda *_: ["tokenizer.json"])
        (root / name / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer.model.save(str(root / "merged"))
    (root / "pieces/tokenizer.model").write_bytes(sentencepiece_model(vocab_size=300))
    gguf_model(root)
    return {"root": root}


def gguf_model(root: pathlib.Path) -> None:
    """A small GGUF file with a tokenizer."""
    import gguf
    from test_gguf import SMALL, described, finished, their_name

    config = transformers.LlamaConfig(**SMALL | {"vocab_size": 258, "num_hidden_layers": 1,
                                                 "tie_word_embeddings": True})
    writer = described(root / "small.gguf", config)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<s>", *letters, "re"])
    writer.add_token_types([3] + [1] * (len(letters) + 1))
    writer.add_token_merges(["r e"])
    writer.add_bos_token_id(0)
    for name, parameter in transformers.AutoModelForCausalLM.from_config(config).named_parameters():
        kind = gguf.GGMLQuantizationType.Q8_0 if parameter.ndim > 1 else None
        values = parameter.detach().numpy()
        values = gguf.quantize(values, kind) if kind is not None else values
        writer.add_tensor(their_name(name), values, raw_dtype=kind)
    finished(writer)


def change_header(draw: random.Random, data: bytes) -> bytes:
    """A safetensors file with its header changed, and the length that the header now has."""
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(draw, data[8:8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length:]


def change_numbers(draw: random.Random, data: bytes) -> bytes:
    """A GGUF file with one of the first 2,000 bytes, where lengths and types lie, changed."""
    return mutate_bytes(draw, data[:2000]) + data[2000:]


TARGETS = {
    "config": ("llama", "config.json", mutate_json),
    "config of experts": ("deepseek", "config.json", mutate_json),
    "config of two": ("t5", "config.json", mutate_json),
    "index": ("gemma3", "model.safetensors.index.json", mutate_json),
    "header": ("llama", "model.safetensors", change_header),
    "weights": ("llama", "model.safetensors", mutate_bytes),
    "gguf": ("small.gguf", None, mutate_bytes),
    "gguf's numbers": ("small.gguf", None, change_numbers),
    "tokenizer": ("llama", "tokenizer.json", mutate_json),
    "tokenizer settings": ("llama", "tokenizer_config.json", mutate_json),
    "special tokens": ("llama", "special_tokens_map.json", mutate_json),
    "generation": ("llama", "generation_config.json", mutate_json),
    "vocabulary": ("bert", "vocab.txt", mutate_bytes),
    "sentencepiece": ("pieces", "tokenizer.model", mutate_bytes),
    "merges": ("merged", "merges.txt", mutate_bytes),
}


def outcomes(root: pathlib.Path, kind: str, count: int, scratch: pathlib.Path) -> dict[str, list]:
    """The seeds of each outcome of so many mutations of a kind."""
    model, name, mutate = TARGETS[kind]
    path = scratch / model
    if name is None:
        shutil.copyfile(root / model, path)
    else:
        shutil.copytree(root / model, path)
    target = path if name is None else path / name
    data = target.read_bytes()
    assert outcome(lambda: read_model(path, scratch / "brought")) == "read"
    found = collections.defaultdict(list)
    for seed in range(count):
        target.write_bytes(mutate(random.Random(f"{kind} {seed}"), data))
        found[outcome(lambda: read_model(path, scratch / "brought"))].append(seed)
    return dict(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_in_one_line(kind, published, tmp_path):
    found = outcomes(published["root"], kind, FEW, tmp_path)
    assert set(found) <= {"read", "refused"}, found
    assert found["refused"], "what refuses nothing shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_read_or_refused_in_one_line(kind, published, tmp_path):
    found = outcomes(published["root"], kind, MANY, tmp_path)
    print(kind, {name: len(seeds) for name, seeds in found.items()})
    assert set(found) <= {"read", "refused"}, found
