"""The certificate of encoders: logits or hidden states of `transformers`, and its bytes."""

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

from batiste import exchange, interop, main
from batiste.interop import FAMILIES, Tensors, WeightMap
from batiste.interop.files import write
from batiste.models import Beside, Transformer

transformers.logging.disable_progress_bar()

SMALL = dict(
    vocab_size=37, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=19, type_vocab_size=3, initializer_range=0.2,
)
DISTIL = dict(vocab_size=37, dim=24, n_layers=3, n_heads=4, hidden_dim=40,
              max_position_embeddings=19, initializer_range=0.2)
CASES = {
    "bert": ("BertForMaskedLM", SMALL),
    "bert without a head": ("BertModel", SMALL | {"hidden_act": "relu"}),
    "bert for pretraining": ("BertForPreTraining", SMALL),
    "roberta": ("RobertaForMaskedLM", SMALL | {"type_vocab_size": 1}),
    "distilbert": ("DistilBertForMaskedLM", DISTIL),
    "albert": ("AlbertForMaskedLM", SMALL | {"embedding_size": 10}),
    "electra": ("ElectraForMaskedLM", SMALL | {"embedding_size": 10}),
    "electra's discriminator": ("ElectraForPreTraining", SMALL | {"embedding_size": 10}),
    "its discriminator of one size": ("ElectraForPreTraining", SMALL | {"embedding_size": 24}),
    "electra without a head": ("ElectraModel", SMALL | {"embedding_size": 24}),
    "electra of one size": ("ElectraForMaskedLM", SMALL | {"embedding_size": 24}),
}
ROWS, LENGTH, FILLED = 3, 12, 9


class Pair(NamedTuple):
    """The same weights as a model of `transformers` and as ours, and what ours said."""

    folder: pathlib.Path
    torch_model: Any
    theirs: dict[str, Any]
    family: interop.Family
    weights: WeightMap
    params: Any
    said_BTX: np.ndarray


def tokens_and_types() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    shape = ROWS, LENGTH
    return (random.integers(3, 37, shape).astype(np.int32),
            random.integers(0, 3, shape).astype(np.int32))


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("encoder")
    name, fields = CASES[request.param]
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    torch_model = kind(kind.config_class(**fields)).eval()
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
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
    aside = weights.aside(found)
    tokens_BT, types_BT = tokens_and_types()
    types_BT = np.minimum(types_BT, (config.token_types or 1) - 1)

    @jax.jit
    def say(params, *rows):
        model = nnx.merge(graphdef, params)
        x_BTD, _ = model.features(*rows[:-1], beside=Beside(types_BT=rows[-1]))
        if config.discriminator:
            return model.replaced_odds(x_BTD)
        return model.logits(x_BTD) if config.head_transform else x_BTD

    positions_BT = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    segments_BT = (positions_BT < FILLED).astype(np.int32)
    said_BTX = np.asarray(say(params, tokens_BT, positions_BT, segments_BT, types_BT))
    weights = WeightMap(family, config, theirs, params, aside)
    return Pair(folder, torch_model, theirs, family, weights, params, said_BTX)


def test_beside_padding_it_says_what_transformers_does(pair):
    tokens_BT, types_BT = tokens_and_types()
    arguments = {"attention_mask": torch.arange(LENGTH)[None].expand(ROWS, -1) < FILLED}
    types = pair.weights.model.token_types
    if types is not None:
        types_BT = torch.tensor(np.minimum(types_BT, types - 1), dtype=torch.long)
        arguments["token_type_ids"] = types_BT
    with torch.no_grad():
        output = pair.torch_model(torch.tensor(tokens_BT, dtype=torch.long), **arguments)
    expected_BTX = next(output[name] for name in (
        "logits", "prediction_logits", "last_hidden_state") if name in output).numpy()
    assert np.abs(expected_BTX).max() > 0.5
    np.testing.assert_allclose(pair.said_BTX[:, :FILLED], expected_BTX[:, :FILLED], atol=1e-4)


def test_its_bytes_come_back_with_what_our_model_lacks(pair, tmp_path):
    dtype = np.dtype(np.float32)
    write(tmp_path, pair.weights.planned(dtype), pair.weights.tensors(pair.params, dtype))
    prefix = pair.torch_model.base_model_prefix + "."
    with (safe_open(pair.folder / "model.safetensors", "np") as theirs,
          safe_open(tmp_path / "model.safetensors", "np") as ours):
        names = {name.removeprefix(prefix): name for name in ours.keys()}
        assert sorted(name.removeprefix(prefix) for name in theirs.keys()) == sorted(names)
        for name in theirs.keys():
            written = ours.get_tensor(names[name.removeprefix(prefix)])
            assert written.tobytes() == theirs.get_tensor(name).tobytes(), name


def test_the_config_comes_back(pair):
    back = pair.family.config_of(pair.weights.model, pair.theirs)
    assert pair.family.model_of(back) == pair.weights.model
    assert {key: back.get(key) for key in pair.theirs} == pair.theirs
    bare = pair.family.config_of(pair.weights.model, {})
    assert pair.family.model_of(bare) == pair.weights.model


def test_a_work_directory_keeps_what_our_model_lacks(tmp_path, capsys):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL | {"initializer_range": 0.2})
    transformers.BertForPreTraining(config).save_pretrained(tmp_path / "theirs")
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef")))
    transformers.BertTokenizer(str(vocab)).save_pretrained(tmp_path / "theirs")
    main.import_weights(tmp_path / "theirs", tmp_path / "run")
    assert "weights only" in (said := capsys.readouterr().out) and "would lose text" in said
    main.export_weights(tmp_path / "run", tmp_path / "ours")
    with (safe_open(tmp_path / "theirs/model.safetensors", "np") as theirs,
          safe_open(tmp_path / "ours/model.safetensors", "np") as ours):
        assert sorted(ours.keys()) == sorted(theirs.keys())
        for name in theirs.keys():
            assert ours.get_tensor(name).tobytes() == theirs.get_tensor(name).tobytes(), name
    assert "AutoModelForPreTraining.from_pretrained" in (tmp_path / "ours/README.md").read_text()
    assert exchange.verify_export(str(tmp_path / "ours")) < 1e-6


def test_a_head_of_another_kind_is_refused_by_name():
    theirs = {"model_type": "electra", "architectures": ["ElectraForTokenClassification"]}
    with pytest.raises(ValueError, match="architectures=.*ElectraForMaskedLM"):
        interop.family_of(theirs, FAMILIES).model_of(SMALL | theirs)
