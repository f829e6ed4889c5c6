"""Keys of a config.json, left out or changed: what `transformers` makes of them, or a refusal."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_encoder_decoder_families import CASES as TWO_SIDED
from test_encoder_families import CASES as ENCODERS
from test_families import CASES as DECODERS
from test_families import torch_twin

from batiste.interop import FAMILIES, Tensors, WeightMap, family_of
from batiste.interop.class_defaults import DEFAULTS, NAMES
from batiste.interop.family import FREE_FIELDS
from batiste.models import Beside, Transformer

CASES = {name: ("AutoModelForCausalLM", DECODERS[name]) for name in (
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3", "deepseek",
    "cohere", "gpt2", "bloom")}
CASES |= {name: (ENCODERS[name][0], ENCODERS[name]) for name in (
    "bert", "roberta", "distilbert", "albert", "electra")}
CASES |= {name: (TWO_SIDED[name][0], TWO_SIDED[name]) for name in ("t5 1.0", "bart", "marian")}
# Spelled in a file beside the keys of the class, and what they are there.
OTHER_KEYS = {
    "attention_bias": False, "sliding_window": None, "head_dim": None, "rope_scaling": None,
    "rope_theta": 10_000.0, "partial_rotary_factor": 1.0, "n_embed": None, "layer_types": None,
    "original_max_position_embeddings": None, "sliding_window_pattern": 6,
    "rope_local_base_freq": 10_000.0, "tie_word_embeddings": None, "num_hidden_layers": None,
    "num_attention_heads": None, "hidden_size": None, "num_experts": None, "num_local_experts": None,
}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
OTHERS: dict[str, list] = {
    "head_dim": [12], "num_key_value_heads": [None, 1], "n_inner": [48], "mlp_only_layers": [[0]],
    "layer_types": [["full_attention"] * 3, MIXED], "sliding_window": [None, 3],
    "rope_parameters": [{"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
                        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0},
                        {"rope_type": "dynamic", "factor": 4.0}],
    "rope_scaling": [{"type": "linear", "factor": 3.0}],
    "final_logit_softcapping": [None, 1.5], "attn_logit_softcapping": [None, 1.5],
    "use_bidirectional_attention": [True], "hidden_act": ["relu", "gelu_new"],
    "activation_function": ["relu", "gelu"], "activation": ["relu"], "hidden_activation": ["gelu"],
    "feed_forward_proj": ["gated-gelu"], "dense_act_fn": ["silu"], "num_decoder_layers": [3],
    "decoder_vocab_size": [36], "q_lora_rank": [None], "logit_scale": [0.5, 0.3],
    "original_max_position_embeddings": [20], "n_embed": [25], "num_hidden_layers": [2],
    "num_attention_heads": [2], "hidden_size": [26], "num_experts": [4], "num_local_experts": [4],
    "tie_word_embeddings": [True, False], "pad_token_id": [3],
    # They say what was written and how, and not what the model is; labels are of another head.
    **dict.fromkeys(("architectures", "dtype", "model_type", "transformers_version", "id2label",
                     "label2id", "return_dict", "problem_type", "classifier_dropout",
                     "summary_activation"), []),
}
random = np.random.default_rng(0)
TOKENS, SOURCE = random.integers(3, 36, (2, 9)), random.integers(3, 36, (2, 20))


def others(key: str, value: Any) -> list:
    """Values that a key does not have."""
    if key in OTHERS:
        return [other for other in OTHERS[key] if other != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        return [value + "x"]
    return [] if value is None or isinstance(value, list | dict) else [value * 2 or type(value)(1)]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[pathlib.Path, Any, dict]:
    """A model of `transformers`, its files, and its config."""
    name, (kind, fields) = CASES[request.param][0], CASES[request.param][1]
    if request.param in DECODERS:
        model = torch_twin(kind, fields)
    else:
        torch.manual_seed(0)
        model = getattr(transformers, name)(getattr(transformers, name).config_class(**fields)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.15 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("case")
    model.save_pretrained(folder)
    return folder, model, json.loads((folder / "config.json").read_text())


def their_logits(model: Any) -> np.ndarray:
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        if hasattr(model, "get_encoder") and hasattr(model.get_encoder(), "block") or (
                "Marian" in type(model).__name__ or "Bart" in type(model).__name__):
            return model(torch.tensor(SOURCE), decoder_input_ids=tokens).logits.numpy()
        return model(tokens).logits.numpy()


def changed_model(model: Any, config: dict) -> Any:
    """The same weights under another config."""
    other = type(model.config).from_dict(json.loads(json.dumps(config)))
    other._attn_implementation = "eager"
    with transformers.initialization.no_init_weights():
        made = type(model)(other).eval()
    weights = model.state_dict()
    for name in [name for name in weights if name.endswith("embed_positions.weight")]:
        if weights[name].shape != made.state_dict()[name].shape:
            del weights[name]  # Of Marian, whose tables are computed and not learned.
            table = made.get_submodule(name.rpartition(".")[0])
            table.weight.data.copy_(table.create_weight())
    made.load_state_dict(weights, strict=len(weights) == len(made.state_dict()))
    made.tie_weights()
    return made


class Ours:
    """Our model of a config: ValueError where it is refused, or the files when they are read."""

    def __init__(self, config: dict, folder: pathlib.Path):
        self.config, self.folder = config, folder
        self.family = family_of(config, FAMILIES)
        self.model = self.family.model_of(config)

    @functools.cached_property
    def weights(self) -> WeightMap:
        """How files hold its parameters; they are those files."""
        weights = WeightMap(self.family, self.model, self.config, self.abstract)
        weights.check(Tensors(self.folder))
        return weights

    @functools.cached_property
    def split(self) -> tuple:
        """Its graph and the shapes of its parameters."""
        return nnx.split(nnx.eval_shape(lambda: Transformer(self.model, rngs=nnx.Rngs(0))), nnx.Param)

    @functools.cached_property
    def abstract(self) -> dict:
        """The shapes of its parameters on one device."""
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=one), nnx.to_pure_dict(self.split[1]))

    def says_the_same(self, base: "Ours") -> bool:
        """Whether nothing that reaches the logits differs; then its parameters are as the base's."""
        tables = self.model.positions in ("learned", "sinusoidal")
        length = {} if tables else {"max_length": 1}
        free = dict.fromkeys(FREE_FIELDS) | length
        one, two = (dataclasses.replace(each.model, **free) for each in (self, base))
        if one != two:
            return False
        self.abstract = base.abstract
        scales = [[each.weights.sizes(row).scale for row in each.weights.rows]
                  for each in (self, base)]
        return scales[0] == scales[1]

    def logits(self) -> np.ndarray:
        """Of the same tokens as theirs."""
        params = self.weights.parameters(Tensors(self.folder), self.abstract)
        tokens, source = TOKENS.astype(np.int32), SOURCE.astype(np.int32)

        @jax.jit
        def said(params):
            model = nnx.merge(self.split[0], params)
            if self.model.form != "encoder_decoder":
                return model(tokens)
            beside = Beside(source_tokens_BS=source, source_segments_BS=np.ones_like(source))
            return model(tokens, None, np.ones_like(tokens), None, beside)

        return np.asarray(said(params))


def test_a_changed_key_is_never_silently_ignored(case):
    """Where ours stays as it was, `transformers` says the same; a refusal names the key.

    The keys that leave ours as it was are changed together, and each alone only to find the culprit.
    """
    folder, model, config = case
    base, expected = Ours(config, folder), their_logits(model)
    unchanged, refused = [], 0
    for key, value in {**OTHER_KEYS, **model.config.to_dict(), **config}.items():
        for other in others(key, value):
            changed = config | {key: other}
            try:
                same = Ours(changed, folder).says_the_same(base)
            except ValueError as error:
                refused += 1
                assert any(name in str(error) for name in (
                    key, "has shape", "no parameter", "no tensor", "their other keys", "head_dim")), (
                    key, other, error)
                continue
            if same:
                unchanged.append((key, other))
    assert len(unchanged) > 5 and refused > 2
    together = their_logits(changed_model(model, config | dict(unchanged)))
    if not np.allclose(together, expected, atol=1e-4) or len(dict(unchanged)) < len(unchanged):
        for key, other in unchanged:
            alone = their_logits(changed_model(model, config | {key: other}))
            np.testing.assert_allclose(alone, expected, atol=1e-4, err_msg=f"{key}={other!r}")


@pytest.mark.slow
def test_a_changed_key_gives_the_logits_of_transformers(case):
    folder, model, config = case
    base, ran = Ours(config, folder), 0
    for key, value in {**OTHER_KEYS, **model.config.to_dict(), **config}.items():
        for other in others(key, value):
            try:
                ours = Ours(config | {key: other}, folder)
                if ours.says_the_same(base):
                    continue
                assert ours.weights
            except ValueError:
                continue
            ran += 1
            theirs = their_logits(changed_model(model, config | {key: other}))
            np.testing.assert_allclose(ours.logits(), theirs, atol=2e-4, err_msg=f"{key}={other!r}")
    assert ran


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_key_that_is_left_out_has_the_classs_default(family):
    """Each key of the class: the same model with it at its default, or the same refusal."""
    kind = transformers.AutoConfig.for_model(family.model_type)
    full = kind.to_dict() | {"model_type": family.model_type, "architectures": [family.architecture]}

    def outcome(config: dict) -> Any:
        try:
            return family.model_of(config)
        except ValueError as error:
            return str(error)

    fixed = {key: value for key, value in family.required.items() if full.get(key) != value}
    if family.model_type == "t5":
        fixed["scale_decoder_outputs"] = True
    assert not isinstance(outcome(full | fixed), str), outcome(full | fixed)
    for key in full.keys() - {"model_type", "architectures"} - fixed.keys():
        without = {name: value for name, value in (full | fixed).items() if name != key}
        assert outcome(without) == outcome(full | fixed), key
    bare = {"model_type": family.model_type} | fixed
    whole = outcome(full | fixed)
    assert outcome(bare) == dataclasses.replace(whole, dtype=outcome(bare).dtype)


def test_the_tables_are_those_of_the_installed_classes():
    for name, table in DEFAULTS.items():
        kind = type(transformers.AutoConfig.for_model(name))
        fields = {field.name: field.default for field in dataclasses.fields(kind)}
        theta = getattr(kind, "default_theta", None)
        fields["rope_theta"] = theta["global"] if isinstance(theta, dict) else theta
        assert {key: fields[key] for key in table} == dict(table), name
        both = {frozenset(pair) for pair in NAMES.get(name, {}).items()}
        assert {frozenset(pair) for pair in kind.attribute_map.items()} - both <= {
            frozenset({"num_mtp_layers", "num_nextn_predict_layers"})}, name
    assert DEFAULTS.keys() == {family.model_type for family in FAMILIES}


REFUSED = {
    "qwen3_moe": ({}, "norm_topk_prob=false, but of qwen3_moe only norm_topk_prob=True"),
    "gemma3_text": ({"use_bidirectional_attention": True}, "use_bidirectional_attention=true"),
    "llama": ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: expected at most 4096"),
    "bloom": ({"n_layer": 3, "num_hidden_layers": 4}, "num_hidden_layers=4 and n_layer=3 are two"),
    "mistral": ({"rope_scaling": {"type": "linear"}}, "rope_type='linear' has no factor"),
    "gemma2": ({"rope_scaling": "yarn"}, "rope_scaling='yarn': expected an object or null"),
    "cohere": ({"num_attention_heads": 0}, "num_attention_heads=0: expected 1 to"),
    "qwen2": ({"use_sliding_window": True, "sliding_window": None, "layer_types":
               ["sliding_attention"] * 32}, "layer_types has sliding_attention, but sliding_window=null"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_family_is_is_refused_by_name(name):
    changed, expected = REFUSED[name]
    with pytest.raises(ValueError, match=expected.replace("(", r"\(")):
        family_of({"model_type": name}, FAMILIES).model_of({"model_type": name} | changed)


def test_published_spellings_are_read():
    bloom = {"model_type": "bloom", "n_embed": 24, "num_attention_heads": 3, "n_layer": 3}
    model = family_of(bloom, FAMILIES).model_of(bloom)
    assert (model.model_dim, model.num_heads, model.num_layers) == (24, 3, 3)
    yarn = {"model_type": "llama", "max_position_embeddings": 512,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    assert family_of(yarn, FAMILIES).model_of(yarn).rope_original_length == 512
    cohere = family_of({"model_type": "cohere"}, FAMILIES)
    assert cohere.model_of({"model_type": "cohere"}).rope_base == 500_000.0


@pytest.mark.parametrize("case", ("gpt2",), indirect=True)
def test_a_head_that_is_said_to_be_tied_and_is_not_is_refused(case, tmp_path):
    folder, _, config = case
    tensors = load_file(folder / "model.safetensors")
    for change, message in ((0.0, None), (1.0, "lm_head.weight is not transformer.wte.weight")):
        head = tensors["transformer.wte.weight"] + np.float32(change)
        save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
        if message is None:
            assert Ours(config, tmp_path).weights
            continue
        with pytest.raises(ValueError, match=message):
            _ = Ours(config, tmp_path).weights
