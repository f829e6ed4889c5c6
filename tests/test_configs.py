"""Every preset loads, says how it is launched, and has the published size and its golden shardings.

`python tests/test_configs.py --update` writes the golden files anew; read what changed.
"""

import dataclasses
import importlib
import json
import math
import pathlib
import re
import shlex
import sys

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from batiste import command_line, interop, main
from batiste.configs import encoder_families, families
from batiste.configs.experiment import Experiment, flatten, from_dict
from batiste.models import Transformer
from batiste.sharding import AXES
from batiste.train import make_program
from batiste.verbs import VERBS

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py")
               if "def get_config" in path.read_text() and path.stem not in ("families", "encoder_families"))
# Parameters as published, and the devices that each docstring says it is meant for.
PRESETS = {
    "gpt2_124m": (124_439_808, 8),
    "c4_1b": (1_100_048_384, 16),
    "llama3_1b": (1_235_814_400, 16),
    "llama3_8b": (8_030_261_248, 64),
    "llama3_70b": (70_553_706_496, 1024),
    "mixtral_8x7b": (46_702_792_704, 64),
}
# What each entry of configs/families.py is elsewhere, and its parameters as published.
PUBLISHED = {
    "gpt2_medium": ("gpt2", 354_823_168),
    "gpt2_large": ("gpt2", 774_030_080),
    "gpt2_xl": ("gpt2", 1_557_611_200),
    "llama2_7b": ("llama", 6_738_415_616),
    "llama2_70b": ("llama", 68_976_648_192),
    "llama3_2_1b": ("llama", 1_235_814_400),
    "llama3_2_3b": ("llama", 3_212_749_824),
    "mistral_7b": ("mistral", 7_241_732_096),
    "qwen2_5_0_5b": ("qwen2", 494_032_768),
    "qwen2_5_7b": ("qwen2", 7_615_616_512),
    "qwen3_0_6b": ("qwen3", 596_049_920),
    "qwen3_8b": ("qwen3", 8_190_735_360),
    "qwen3_30b_a3b": ("qwen3_moe", 30_532_122_624),
    "gemma2_2b": ("gemma2", 2_614_341_888),
    "gemma2_9b": ("gemma2", 9_241_705_984),
    "gemma2_27b": ("gemma2", 27_227_128_320),
    "gemma3_1b": ("gemma3_text", 999_885_952),
    "gemma3_4b": ("gemma3_text", 3_880_263_168),
    "smollm2_135m": ("llama", 134_515_008),
    "smollm2_360m": ("llama", 361_821_120),
    "smollm2_1_7b": ("llama", 1_711_376_384),
    "bloom_560m": ("bloom", 559_214_592),
    "bloom_7b1": ("bloom", 7_069_016_064),
    "bloom_176b": ("bloom", 176_247_271_424),
    "deepseek_v3": ("deepseek_v3", 671_026_419_200),
    "palm_8b": ("cohere", 8_632_012_800),
    "palm_62b": ("cohere", 62_495_662_080),
    "palm_540b": ("cohere", 540_356_474_880),
}
# The same of configs/encoder_families.py, counted by `transformers`. Less what no token has: two rows
# of each table of places of RoBERTa and BART. ELECTRA's are both parts, with one set of tables.
PUBLISHED_ENCODERS = {
    "bert_base": ("bert", 109_514_298),
    "bert_large": ("bert", 335_174_458),
    "roberta_base": ("roberta", 124_697_433 - 2 * 768),
    "roberta_large": ("roberta", 355_412_057 - 2 * 1024),
    "distilbert_base": ("distilbert", 66_985_530),
    "albert_base": ("albert", 11_221_680),
    "albert_xxlarge": ("albert", 206_368_944),
    "electra_small": ("electra", 13_549_057 + 647_162),
    "electra_base": ("electra", 109_483_009 + 9_903_418),
    "electra_large": ("electra", 335_142_913 + 19_512_378),
    "t5_v1_1_base": ("t5", 247_577_856),
    "t5_v1_1_large": ("t5", 783_150_080),
    "t5_v1_1_xl": ("t5", 2_849_757_184),
    "t5_v1_1_xxl": ("t5", 11_135_332_352),
    "bart_base": ("bart", 139_420_416 - 4 * 768),
    "bart_large": ("bart", 406_291_456 - 4 * 1024),
    "transformer_base": ("marian", 63_082_496),
    "transformer_big": ("marian", 214_245_376),
}
TABLES = ((families, PUBLISHED), (encoder_families, PUBLISHED_ENCODERS))
MOST_FIELDS = 150


def load(name: str) -> Experiment:
    return importlib.import_module(f"batiste.configs.{name}").get_config()


def abstract_program(name: str):
    """The preset laid out on as many devices as it is meant for, none of which is needed."""
    experiment, (_, devices) = load(name), PRESETS[name]
    mesh = AbstractMesh(experiment.mesh.shape(devices), AXES)
    return make_program(experiment.model, experiment.train, mesh, experiment.mesh)


def by_path(tree) -> dict[str, object]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def sharding_table(name: str) -> str:
    """One line per parameter: path, letters, shape, its sharding, that of its optimizer state."""
    program = abstract_program(name)
    state = program.abstract_state
    mesh = next(iter(jax.tree.leaves(state.params))).sharding.mesh
    lines = ["mesh " + " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
             + f" zero={program.layout.zero}"]
    letters, moments = by_path(program.letters), by_path(state.optimizer_state)
    for path, leaf in by_path(state.params).items():
        of_state = sorted({str(moment.sharding.spec) for where, moment in moments.items()
                           if where.endswith("/" + path)})
        lines.append(f"{path} {letters[path]} {leaf.shape} {leaf.sharding.spec} "
                     f"state {' '.join(of_state)}")
    return "\n".join(lines) + "\n"


def goldens() -> dict[str, str]:
    """What each golden file should hold now."""
    tables = {f"sharding_{name}.txt": sharding_table(name) for name in PRESETS}
    return tables | {"config_fields.txt": "\n".join(flatten(Experiment())) + "\n"}


def test_the_presets_are_the_configs_of_more_than_a_laptop():
    assert set(NAMES) - set(PRESETS) == {
        "objectives", "quickstart", "shakespeare", "smollm2_135m"}


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_valid_where_it_is_meant_to_run(name):
    load(name).validate_on(PRESETS[name][1] if name in PRESETS else 1)


class Launched(Exception):
    """Raised in place of training."""


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_holds_the_command_that_launches_it(name, monkeypatch):
    def launched(experiment, workdir, *others):
        raise Launched(experiment, workdir)

    monkeypatch.setattr(main, "train", launched)
    monkeypatch.setattr(main, "import_weights", lambda source, workdir, experiment, break_lock: launched(
        experiment, workdir))
    docstring = importlib.import_module(f"batiste.configs.{name}").__doc__
    docstring = docstring.replace("\\\n", "") + "\n"
    command = re.search(r"^ {4}(batiste (?:import|train) .*)$", docstring, re.M)[1]
    assert f"--config=configs/{name}.py " in command + " "
    with pytest.raises(Launched) as caught:
        command_line.run(shlex.split(command))
    assert caught.value.args == (load(name), f"runs/{name}")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_its_size_and_batch_and_has_them(name):
    published, _ = PRESETS[name]
    docstring = importlib.import_module(f"batiste.configs.{name}").__doc__
    leaves = jax.tree.leaves(abstract_program(name).abstract_state.params)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == published
    assert f"{published:,}" in docstring
    experiment = load(name)
    tokens = experiment.train.batch_size * experiment.data.sequence_length
    assert f"{tokens:,} tokens a" in " ".join(docstring.split())


def test_every_published_model_is_in_the_table():
    for module, published in TABLES:
        assert list(module.MODELS) == list(published)


@pytest.mark.parametrize("module,name,family,published", [
    (module, name, *facts) for module, table in TABLES for name, facts in table.items()],
    ids=[name for _, table in TABLES for name in table])
def test_a_published_model_has_its_family_and_its_parameters(module, name, family, published):
    experiment = module.get_config(name)
    experiment.validate()
    one = dataclasses.replace(experiment.model, generator_heads=None)
    (known,) = (each for each in interop.FAMILIES if each.model_type == family)
    assert known.config_of(one, {})["model_type"] == family
    if family != "roberta":  # Whose sizes and parts are those of a BERT, too.
        assert interop.fitting_family(one, interop.FAMILIES) is known
    model = nnx.eval_shape(lambda: Transformer(experiment.model, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == published


def test_the_commands_of_the_families_are_accepted():
    pages = families.__doc__ + encoder_families.__doc__
    for verb, flags in re.findall(r"^ {4}batiste (\w+) (.*)$", pages, re.M):
        values = command_line._parse(VERBS[verb].define, ["batiste", *shlex.split(flags)])
        assert values.config.model.vocab_size > 10_000
    with pytest.raises(ValueError, match="expected one of gpt2_medium, "):
        families.get_config("gemma9")
    with pytest.raises(ValueError, match="expected one of bert_base, "):
        encoder_families.get_config("bert_bose")


@pytest.mark.parametrize("name", NAMES)
def test_a_config_survives_json(name):
    experiment = load(name)
    restored = from_dict(Experiment, json.loads(json.dumps(dataclasses.asdict(experiment))))
    assert restored == experiment


def test_an_unknown_field_in_json_is_named():
    stored = dataclasses.asdict(Experiment())
    stored["model"]["num_lairs"] = 3
    with pytest.raises(ValueError, match="TransformerConfig has no field num_lairs"):
        from_dict(Experiment, stored)
    stored = dataclasses.asdict(Experiment())
    stored["train"]["health"]["policies"] = {"plateau": "log"}
    with pytest.raises(ValueError, match="not fields plateau: .* another version"):
        from_dict(Experiment, stored)


@pytest.mark.parametrize("file", [f"sharding_{name}.txt" for name in PRESETS])
def test_the_derived_shardings_are_the_golden_ones(file):
    name = file.removeprefix("sharding_").removesuffix(".txt")
    assert sharding_table(name) == (GOLDEN / file).read_text()


def test_the_fields_are_frozen_and_few():
    fields = list(flatten(Experiment()))
    assert fields == (GOLDEN / "config_fields.txt").read_text().split()
    assert len(fields) <= MOST_FIELDS


if __name__ == "__main__" and sys.argv[1:] == ["--update"]:
    for file_name, content in goldens().items():
        (GOLDEN / file_name).write_text(content)
