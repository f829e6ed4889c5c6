"""A GGUF file is the model that its weights, quantized or not, stand for."""

import json
import pathlib

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from test_data_tokenizer import TEXTS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from batiste import exchange, interop
from batiste.data import load_tokenizer, pack_tokenizer
from batiste.interop import FAMILIES, WeightMap, gguf_files
from batiste.interop.gguf_files import GGUFile
from batiste.interop.gguf_tokenizer import bring_tokenizer
from batiste.models import Transformer

# Rows of the quantized are multiples of 32 long.
SMALL = dict(
    vocab_size=41, hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, intermediate_size=160, max_position_embeddings=48,
    rms_norm_eps=1e-5,
)
KINDS = gguf.GGMLQuantizationType
CASES = {
    "llama of floats": ("LlamaConfig", {"rope_theta": 500.0}, KINDS.F32),
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}, KINDS.Q8_0),
    "qwen2": ("Qwen2Config", {"head_dim": 24}, KINDS.Q4_1),
    "qwen3": ("Qwen3Config", {"rope_theta": 500.0}, KINDS.BF16),
}
NAMES = {
    "embed_tokens": "token_embd", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
    "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "norm": "output_norm",
}


def their_name(name: str) -> str:
    parts = name.removeprefix("model.").split(".")
    layer = f"blk.{parts[1]}." if parts[0] == "layers" else ""
    return f"{layer}{NAMES[parts[-2]]}.{parts[-1]}"


def apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp wants it: of each head's rows, one of the first half, one of the second, ..."""
    by_head = rows.reshape(heads, 2, -1, rows.shape[1])
    return np.stack([by_head[:, 0], by_head[:, 1]], 2).reshape(rows.shape)


def described(path: pathlib.Path, config) -> gguf.GGUFWriter:
    """A file that has all but weights and tokenizer."""
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type != "qwen2":
        writer.add_key_length(16)
    return writer


def finished(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(params=CASES)
def twin(request, tmp_path) -> tuple[pathlib.Path, torch.nn.Module]:
    """A file, and the model of `transformers` with the weights that it stands for."""
    name, fields, kind = CASES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SMALL | fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    writer = described(tmp_path / "small.gguf", config)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter += 0.15 * torch.randn_like(parameter)
        own = kind if parameter.ndim > 1 else KINDS.F32
        quantized = gguf.quantize(parameter.detach().numpy(), own)
        with torch.no_grad():
            parameter.copy_(torch.tensor(gguf.dequantize(quantized, own)))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        if config.model_type == "llama" and part in heads:
            quantized = apart(quantized, heads[part])
        writer.add_tensor(their_name(name), quantized, raw_dtype=own)
    finished(writer)
    return tmp_path / "small.gguf", model


def test_its_logits_are_those_of_what_it_stands_for(twin):
    path, torch_model = twin
    file = GGUFile(path)
    family = interop.family_of(file.theirs, FAMILIES)
    config = family.model_of(file.theirs)
    assert config.norm_epsilon == 1e-5
    graphdef, abstract = nnx.split(
        nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=one), nnx.to_pure_dict(abstract))
    params = WeightMap(family, config, file.theirs, abstract).parameters(file, abstract)
    tokens_BT = np.random.default_rng(0).integers(0, 41, (3, 11)).astype(np.int32)
    logits_BTV = jax.jit(lambda params: nnx.merge(graphdef, params)(jnp.asarray(tokens_BT)))(params)
    with torch.no_grad():
        expected_BTV = torch_model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
    assert np.abs(expected_BTV).max() > 0.5
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=1e-4)


LLAMA_CUT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory) -> tuple[pathlib.Path, Tokenizer]:
    """A file with a tokenizer, and that tokenizer."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA_CUT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|begin|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SMALL | {
        "vocab_size": len(pieces), "num_hidden_layers": 1, "tie_word_embeddings": True})
    path = tmp_path_factory.mktemp("gguf") / "talks.gguf"
    writer = described(path, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(pieces)
    writer.add_token_types([3, 3] + [1] * (len(pieces) - 2))
    writer.add_token_merges([" ".join(each) for each in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, parameter in transformers.AutoModelForCausalLM.from_config(config).named_parameters():
        writer.add_tensor(their_name(name), parameter.detach().numpy())
    finished(writer)
    return path, tokenizer


def test_its_tokenizer_and_chat_template_come_along(with_tokenizer, tmp_path):
    path, tokenizer = with_tokenizer
    workdir = tmp_path / "run"
    experiment = exchange.import_model(str(path), str(workdir))
    found = load_tokenizer(pathlib.Path(experiment.data.tokenizer))
    tokenizer.encode_special_tokens = True
    for text in (*TEXTS, "<|end|> 1234567 it's  \n\n  x"):
        ids = found.encode(text)
        assert ids == tokenizer.encode(text).ids and found.decode(ids) == text
    assert (found.begin_ids, found.bos_id, found.end_id) == ((0,), 0, 1)
    assert found.stop_ids == (1, 2)  # Of a text, and of a turn.
    files = workdir / "imported" / "files"
    loaded = transformers.AutoTokenizer.from_pretrained(files)
    assert loaded.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi"
    assert loaded("a <|end|>")["input_ids"][-1] == 1


def test_tokenizers_cut_text_as_their_models_want(tmp_path):
    said = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.bos_token_id": 0}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    said["tokenizer.ggml.tokens"] = ["<s>", *letters, "12", "123", "1234"]
    said["tokenizer.ggml.merges"] = ["1 2", "12 3", "123 4"]
    said["tokenizer.ggml.token_type"] = [3] + [1] * (len(letters) + 3)
    cuts = {}
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        folder = tmp_path / pre
        folder.mkdir()
        bring_tokenizer(said | {"tokenizer.ggml.pre": pre}, folder)
        (folder / "packed.json").write_bytes(pack_tokenizer(folder))
        tokenizer = load_tokenizer(folder / "packed.json")
        cuts[pre] = [tokenizer.decode([index]) for index in tokenizer.encode("1234")]
    digits = ["1", "2", "3", "4"]
    assert cuts == {"gpt-2": ["1234"], "smollm": digits, "llama-bpe": ["123", "4"], "qwen2": digits}


@pytest.mark.parametrize("key,value,expected", (
    ("general.architecture", "mamba", "architecture='mamba': expected one of llama"),
    ("llama.expert_count", 8, "llama.expert_count=8 is not known"),
    ("llama.rope.dimension_count", 8, "rope.dimension_count=8: expected the head dim, 16"),
    ("tokenizer.ggml.pre", "tekken", "pre='tekken': expected one of gpt-2"),
    ("tokenizer.ggml.model", "llama", "model='llama': expected 'gpt2'"),
))
def test_what_is_not_known_is_refused_by_name(
        with_tokenizer, tmp_path, monkeypatch, key, value, expected):
    header = gguf_files.read_header(with_tokenizer[0], gguf_files._sizes(with_tokenizer[0]))
    header.metadata[key] = value
    monkeypatch.setattr(gguf_files, "read_header", lambda path, sizes: header)
    with pytest.raises(ValueError, match=expected):
        GGUFile(with_tokenizer[0]).bring(tmp_path)


def test_a_file_that_is_cut_short_is_refused(with_tokenizer, tmp_path):
    whole = with_tokenizer[0].read_bytes()
    for size in (3, 100, len(whole) // 2, len(whole) - 40):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a GGUF file, or cut short"):
            GGUFile(path)
