"""The certificate: each family's logits are those of `transformers`, and its bytes come back."""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors import safe_open

from batiste import interop
from batiste.interop import FAMILIES, Family, Tensors, WeightMap
from batiste.interop import weights as weights_module
from batiste.interop.files import write
from batiste.models import Transformer, TransformerConfig

transformers.logging.disable_progress_bar()

# Sizes that all differ; three layers, so that patterns do not end with the depth.
SMALL = dict(
    vocab_size=37, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=40, max_position_embeddings=48, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)
HEAD = SMALL | {"head_dim": 10}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 200,
        "rope_theta": 500.0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
BLOOM = dict(vocab_size=37, hidden_size=24, n_layer=3, n_head=3)
GPT2 = dict(vocab_size=37, n_embd=24, n_layer=3, n_head=4, n_positions=48, n_inner=40)
DEEPSEEK = {
    "num_key_value_heads": 4, "q_lora_rank": 14, "kv_lora_rank": 9, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6, "v_head_dim": 7, "n_routed_experts": 5, "num_experts_per_tok": 2,
    "n_shared_experts": 2, "moe_intermediate_size": 20, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1,
}
CASES = {
    "gpt2": ("GPT2Config", GPT2),
    "llama": ("LlamaConfig", HEAD | {"rope_parameters": LLAMA3}),
    "smollm2": ("LlamaConfig", SMALL | {"tie_word_embeddings": True, "rope_theta": 1000.0}),
    "mistral": ("MistralConfig", HEAD | {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", SMALL | {"use_sliding_window": True, "sliding_window": 4,
                                      "max_window_layers": 1}),
    "qwen3 in longer rows": ("Qwen3Config", HEAD | {"head_dim": 16, "rope_parameters": YARN}),
    "qwen3": ("Qwen3Config", HEAD | {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeConfig", HEAD | {
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
        "norm_topk_prob": True}),
    "mixtral": ("MixtralConfig", HEAD | {"num_local_experts": 3}),
    "gemma2": ("Gemma2Config", HEAD | {
        "sliding_window": 5, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", HEAD | {
        "sliding_window": 5, "query_pre_attn_scalar": 7, "rope_parameters": GEMMA3_ROPE,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    "deepseek": ("DeepseekV3Config", SMALL | DEEPSEEK),
    "deepseek without a low rank for queries": (
        "DeepseekV3Config", SMALL | DEEPSEEK | {
            "rms_norm_eps": 1e-3, "q_lora_rank": None, "first_k_dense_replace": 0}),
    "deepseek with groups of experts": ("DeepseekV3Config", SMALL | DEEPSEEK | {
        "n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3}),
    "cohere": ("CohereConfig", SMALL | {"logit_scale": 0.25}),
    "bloom": ("BloomConfig", BLOOM),
}
ROWS, LENGTH, CHUNK = 3, 12, 4


class Pair(NamedTuple):
    """The same weights as a model of `transformers` and as ours."""

    folder: pathlib.Path
    torch_model: Any
    family: Family
    theirs: dict[str, Any]
    config: TransformerConfig
    weights: WeightMap
    graphdef: Any
    params: Any
    forward: Any


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory) -> Pair:
    return paired(tmp_path_factory.mktemp(request.param), torch_twin(*CASES[request.param]))


def paired(folder: pathlib.Path, torch_model: Any) -> Pair:
    """A model of `transformers`, and ours made of its files."""
    torch_model.save_pretrained(folder)
    theirs = json.loads((folder / "config.json").read_text())
    family = interop.family_of(theirs, FAMILIES)
    config = family.model_of(theirs)
    graphdef, abstract = nnx.split(
        nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one),
        nnx.to_pure_dict(abstract))
    weights = WeightMap(family, config, theirs, abstract)
    params = weights.parameters(Tensors(folder), abstract)

    @jax.jit
    def forward(params, tokens_BT, positions_BT, segments_BT):
        return nnx.merge(graphdef, params)(tokens_BT, positions_BT, segments_BT)

    return Pair(folder, torch_model, family, theirs, config, weights, graphdef, params, forward)


def torch_twin(name: str, fields: dict[str, Any]):
    """A model of `transformers` of which all parameters are random, also norms and biases."""
    torch.manual_seed(0)
    config = getattr(transformers, name)(**fields)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        learned = [each for name, each in model.named_buffers() if name.endswith("correction_bias")]
        for parameter in (*model.parameters(), *learned):
            parameter += 0.15 * torch.randn_like(parameter)
    return model


def tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 37, (ROWS, LENGTH)).astype(np.int32)


def torch_logits(pair: Pair, tokens_BT: np.ndarray, **arguments) -> np.ndarray:
    with torch.no_grad():
        tokens_BT = torch.tensor(tokens_BT, dtype=torch.long)
        return pair.torch_model(tokens_BT, **arguments).logits.numpy()


def places(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of documents of these lengths, packed in every row and then padded."""
    positions = [place for length in lengths for place in range(length)]
    segments = [index + 1 for index, length in enumerate(lengths) for _ in range(length)]
    padding = [0] * (LENGTH - len(segments))
    return tuple(np.tile(np.int32(row + padding), (ROWS, 1)) for row in (positions, segments))


def test_logits_are_those_of_transformers(pair):
    tokens_BT = tokens(0)
    logits_BTV = pair.forward(pair.params, tokens_BT, *places(LENGTH))
    expected_BTV = torch_logits(pair, tokens_BT)
    assert np.abs(expected_BTV).max() > 0.5, "all but equal logits prove nothing"
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=1e-4)


def test_logits_beside_padding_are_those_of_transformers(pair):
    tokens_BT = tokens(1)
    logits_BTV = pair.forward(pair.params, tokens_BT, *places(9))
    mask = torch.tensor(places(9)[1]).bool().long()
    expected_BTV = torch_logits(pair, tokens_BT, attention_mask=mask)
    np.testing.assert_allclose(logits_BTV[:, :9], expected_BTV[:, :9], atol=1e-4)


def test_logits_beside_padding_on_the_left_are_those_of_transformers(pair):
    """As it pads to generate: each row begins later, and its places count from there."""
    tokens_BT, padding = tokens(4), np.array([[0], [5], [2]])
    real_BT = np.arange(LENGTH)[None] >= padding
    positions_BT = np.maximum(np.arange(LENGTH)[None] - padding, 0).astype(np.int32)
    logits_BTV = pair.forward(pair.params, tokens_BT, positions_BT, real_BT.astype(np.int32))
    arguments = {"attention_mask": torch.tensor(real_BT).long()}
    if pair.family.model_type != "bloom":  # It counts places by the mask, and takes no others.
        arguments["position_ids"] = torch.tensor(positions_BT).long()
    expected_BTV = torch_logits(pair, tokens_BT, **arguments)
    np.testing.assert_allclose(
        np.asarray(logits_BTV)[real_BT], expected_BTV[real_BT], atol=1e-4)


def test_packed_documents_have_the_logits_of_each_alone(pair):
    tokens_BT = tokens(2)
    logits_BTV = pair.forward(pair.params, tokens_BT, *places(7, 5))
    for start, end in ((0, 7), (7, 12)):
        expected_BTV = torch_logits(pair, tokens_BT[:, start:end])
        np.testing.assert_allclose(logits_BTV[:, start:end], expected_BTV, atol=1e-4)


def test_cached_decoding_has_the_logits_of_transformers(pair):
    tokens_BT = tokens(3)

    @jax.jit
    def extend(params, tokens_BT, cache):
        model = nnx.merge(pair.graphdef, params)
        x_BTD, cache = model.extend(tokens_BT, cache)
        return model.logits(x_BTD), cache

    cache = nnx.merge(pair.graphdef, pair.params).empty_cache(ROWS, LENGTH)
    pieces = []
    for start in range(0, LENGTH, CHUNK):
        logits_BTV, cache = extend(pair.params, tokens_BT[:, start:start + CHUNK], cache)
        pieces.append(logits_BTV)
    expected_BTV = torch_logits(pair, tokens_BT)
    np.testing.assert_allclose(np.concatenate(pieces, 1), expected_BTV, atol=1e-4)


def test_the_bytes_come_back(pair, tmp_path):
    dtype = np.dtype(np.float32)
    planned = pair.weights.planned(dtype)
    write(tmp_path, planned, pair.weights.tensors(pair.params, dtype), shard_bytes=20_000)
    written = {}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            assert path.stat().st_size < 25_000
            written |= {name: file.get_tensor(name) for name in file.keys()}
    read = Tensors(tmp_path)
    assert all(read.read(name).tobytes() == tensor.tobytes() for name, tensor in written.items())
    with safe_open(pair.folder / "model.safetensors", "np") as file:
        assert sorted(file.keys()) == sorted(written)
        for name in file.keys():
            assert file.get_tensor(name).tobytes() == written[name].tobytes(), name


@pytest.mark.parametrize("pair", ("qwen3_moe",), indirect=True)
def test_tensors_that_come_in_pieces_are_the_same(pair, monkeypatch):
    """Pieces that do not divide a tensor, of whole parameters, of a layer's and of an expert's."""
    monkeypatch.setattr(weights_module, "MOST_AT_ONCE", 700)
    again = pair.weights.parameters(Tensors(pair.folder), pair.params)
    jax.tree.map(np.testing.assert_array_equal, again, pair.params)


def test_files_of_a_model_without_its_head_are_read(pair, tmp_path):
    dtype = np.dtype(np.float32)
    planned = [each._replace(name=each.name.removeprefix("model.").removeprefix("transformer."))
               for each in pair.weights.planned(dtype)]
    write(tmp_path, planned, pair.weights.tensors(pair.params, dtype))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        pair.params)
    again = pair.weights.parameters(Tensors(tmp_path), abstract)
    jax.tree.map(np.testing.assert_array_equal, again, pair.params)


def test_the_config_comes_back(pair):
    back = pair.family.config_of(pair.config, pair.theirs)
    assert pair.family.model_of(back) == pair.config
    for spelling in ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}):
        without = {key: value for key, value in back.items() if key != "dtype"}
        assert pair.family.model_of(without | spelling).dtype == "bfloat16"
    old = {key: value for key, value in back.items() if key != "rope_parameters"}
    if "rope_local_base_freq" in old:
        old["rope_scaling"] = back["rope_parameters"]["full_attention"]
    assert pair.family.model_of(old) == pair.config
    bare = pair.family.config_of(pair.config, {})
    again = dataclasses.replace(pair.family.model_of(bare), dtype=pair.config.dtype)
    assert again == pair.config
