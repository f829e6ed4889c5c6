"""The certificate of encoder-decoders: logits of `transformers`, also decoded, and its bytes."""

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
from batiste.interop import FAMILIES, Tensors, WeightMap
from batiste.interop.files import write
from batiste.models import Beside, Transformer

transformers.logging.disable_progress_bar()

T5 = dict(vocab_size=37, d_model=24, d_kv=10, d_ff=40, num_layers=3, num_decoder_layers=2,
          num_heads=3, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
BART = dict(vocab_size=37, d_model=24, encoder_layers=3, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=40,
            decoder_ffn_dim=40, max_position_embeddings=48, init_std=0.2)
MARIAN = BART | dict(vocab_size=37, decoder_vocab_size=37, activation_function="relu",
                     scale_embedding=True, pad_token_id=36, decoder_start_token_id=36)
T5_TIED = T5 | {"feed_forward_proj": "relu", "tie_word_embeddings": True}
CASES = {"t5": ("T5ForConditionalGeneration", T5),
         "t5 1.0": ("T5ForConditionalGeneration", T5_TIED), "bart": ("BartForConditionalGeneration", BART),
         "marian": ("MarianMTModel", MARIAN)}
# The source is longer than 32, where T5's buckets begin to be wider than one.
ROWS, LENGTH, SOURCE, FILLED = 3, 7, 41, 36


class Pair(NamedTuple):
    """The same weights as a model of `transformers` and as ours."""

    folder: Any
    torch_model: Any
    theirs: dict[str, Any]
    family: interop.Family
    weights: WeightMap
    graphdef: Any
    params: Any


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory) -> Pair:
    return paired(tmp_path_factory.mktemp("two"), torch_twin(*CASES[request.param]))


def torch_twin(name: str, fields: dict[str, Any]):
    """A model of `transformers` of which all parameters are random."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    torch_model = kind(kind.config_class(**fields)).eval()
    if fields.get("tie_word_embeddings") is False:
        torch_model.lm_head.weight = torch.nn.Parameter(torch.randn(37, 24))
    with torch.no_grad():
        for parameter in torch_model.parameters():
            if parameter.requires_grad:  # Not a table of sinusoids.
                parameter += 0.15 * torch.randn_like(parameter)
    return torch_model


def paired(folder: pathlib.Path, torch_model: Any) -> Pair:
    """A model of `transformers`, and ours made of its files."""
    torch_model.save_pretrained(folder)
    theirs = json.loads((folder / "config.json").read_text())
    family = interop.family_of(theirs, FAMILIES)
    config = family.model_of(theirs)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    graphdef, abstract = nnx.split(
        nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one),
        nnx.to_pure_dict(abstract))
    found = Tensors(folder)
    weights = WeightMap(family, config, theirs, abstract)
    params = weights.parameters(found, abstract)
    weights = WeightMap(family, config, theirs, params, weights.aside(found))
    return Pair(folder, torch_model, theirs, family, weights, graphdef, params)


def test_logits_are_those_of_transformers_beside_padding_and_decoded(pair):
    random = np.random.default_rng(0)
    tokens_BT = random.integers(3, 37, (ROWS, LENGTH)).astype(np.int32)
    source_BS = random.integers(3, 37, (ROWS, SOURCE)).astype(np.int32)
    segments_BS = np.tile((np.arange(SOURCE) < FILLED).astype(np.int32), (ROWS, 1))
    with torch.no_grad():
        expected_BTV = pair.torch_model(
            torch.tensor(source_BS, dtype=torch.long), attention_mask=torch.tensor(segments_BS),
            decoder_input_ids=torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
    assert np.abs(expected_BTV).max() > 0.5

    @jax.jit
    def both(params):
        model = nnx.merge(pair.graphdef, params)
        beside = Beside(source_tokens_BS=source_BS, source_segments_BS=segments_BS)
        full_BTV = model(tokens_BT, None, np.ones_like(tokens_BT), None, beside)
        cache = model.read(source_BS, segments_BS, LENGTH)
        x_BTD, cache = model.extend(tokens_BT[:, :4], cache)
        y_BTD, _ = model.extend(tokens_BT[:, 4:], cache)
        return full_BTV, model.logits(x_BTD), model.logits(y_BTD)

    full_BTV, *parts = both(pair.params)
    np.testing.assert_allclose(full_BTV, expected_BTV, atol=1e-4)
    np.testing.assert_allclose(np.concatenate(parts, 1), expected_BTV, atol=1e-4)


def test_its_bytes_and_its_config_come_back(pair, tmp_path):
    dtype = np.dtype(np.float32)
    write(tmp_path, pair.weights.planned(dtype), pair.weights.tensors(pair.params, dtype))
    with (safe_open(pair.folder / "model.safetensors", "np") as theirs,
          safe_open(tmp_path / "model.safetensors", "np") as ours):
        assert sorted(ours.keys()) == sorted(theirs.keys())
        for name in theirs.keys():
            assert ours.get_tensor(name).tobytes() == theirs.get_tensor(name).tobytes(), name
    for brought in (pair.theirs, {}):
        back = pair.family.config_of(pair.weights.model, brought)
        assert pair.family.model_of(back) == pair.weights.model


@pytest.mark.parametrize("theirs,expected", (
    (T5 | {"model_type": "t5", "feed_forward_proj": "gated-silu"}, "expected one of relu, gated"),
    (BART | {"model_type": "bart", "encoder_ffn_dim": 48}, "encoder_ffn_dim=48, decoder_ffn_dim"),
))
def test_what_our_model_cannot_be_is_refused_by_name(theirs, expected):
    with pytest.raises(ValueError, match=expected):
        interop.family_of(theirs, FAMILIES).model_of(theirs)


@pytest.mark.parametrize("pair", ("bart",), indirect=True)
def test_a_bias_of_logits_that_is_not_zero_is_refused(pair, tmp_path):
    (name,) = pair.family.zeros
    aside = {name: np.full((1, 37), 0.5, np.float32)}
    weights = WeightMap(pair.family, pair.weights.model, pair.theirs, pair.params, aside)
    dtype = np.dtype(np.float32)
    write(tmp_path, weights.planned(dtype), weights.tensors(pair.params, dtype))
    with pytest.raises(ValueError, match=f"{name} is not 0 everywhere"):
        weights.check(Tensors(tmp_path))
