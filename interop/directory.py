"""A model's directory as the Hugging Face hub has it: config, weights, tokenizer, card."""

import functools
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from batiste.data.json_files import read_json
from batiste.interop import files
from batiste.interop.gguf_files import SUFFIX, GGUFile
from batiste.interop.weights import WeightMap

CONFIG, GENERATION = "config.json", "generation_config.json"
# What belongs to a model besides its weights, and is brought along as it is.
BROUGHT = (
    CONFIG, GENERATION, "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "chat_template.jinja", "chat_template.json",
)
# What a model has that ours lack, in a folder of its own.
ASIDE = "aside"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",
       "forced_bos_token_id")
# By the end of a class's name: what it is for, and which class finds it.
TASKS = {
    "ElectraForPreTraining": ("feature-extraction", "AutoModelForPreTraining"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "ForPreTraining": ("fill-mask", "AutoModelForPreTraining"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM"),
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "ForConditionalGeneration": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "Model": ("feature-extraction", "AutoModel"),
}


class Source(NamedTuple):
    """A model's files: its config, its tensors, and what copies the others to a folder."""

    theirs: dict[str, Any]
    tensors: files.Tensors | GGUFile
    bring: Callable[[pathlib.Path], list[str]]


def open_source(path: pathlib.Path) -> Source:
    """The files of a directory, of a .safetensors file in one, or of a .gguf file alone."""
    if path.suffix == SUFFIX:
        file = GGUFile(path)
        return Source(file.theirs, file, file.bring)
    theirs = read_config(path)
    return Source(theirs, files.Tensors(path), functools.partial(bring, path))


def read_config(source: pathlib.Path) -> dict[str, Any]:
    """The config.json of a directory, or beside a file of weights; ValueError if it has none."""
    folder = source if source.is_dir() else source.parent
    if not source.exists():
        raise ValueError(f"from={source}: no such directory or file")
    if source.is_file() and source.suffix != ".safetensors":
        raise ValueError(f"from={source}: expected a directory, a .safetensors file in one, "
                         "or a .gguf file")
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"from={source}: {path} is missing; it says what model the weights are of")
    return read_json(path, {"model_type": str})


def bring(source: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Copies what belongs to a model besides its weights; returns the names of what there was."""
    folder.mkdir(parents=True, exist_ok=True)
    origin = source if source.is_dir() else source.parent
    names = [name for name in BROUGHT if (origin / name).is_file()]
    for name in names:
        shutil.copyfile(origin / name, folder / name)
    return names


def write_aside(folder: pathlib.Path, aside: Mapping[str, np.ndarray]) -> None:
    """Keeps tensors that no parameter has, as they came; none leave no trace."""
    if aside:
        (folder / ASIDE).mkdir()
        planned = [files.Planned(name, each.dtype, each.shape) for name, each in aside.items()]
        files.write(folder / ASIDE, planned, aside.values())


def read_aside(folder: pathlib.Path | None) -> dict[str, np.ndarray]:
    """What `write_aside` kept there."""
    if folder is None or not (folder / ASIDE).is_dir():
        return {}
    kept = files.Tensors(folder / ASIDE)
    return {name: kept.read(name) for name in kept.entries}


class Written(NamedTuple):
    """What a directory is made of: weights and dtype in files, their config, what was brought."""

    weights: WeightMap
    params: Any
    dtype: np.dtype
    theirs: Mapping[str, Any]
    brought: pathlib.Path | None


def write_directory(folder: pathlib.Path, content: Written, name: str) -> None:
    """Writes config, weights, tokenizer, generation config and card, and reads the weights back.

    name: of the model, for its card. Raises ValueError if a tensor does not come back as written.
    """
    if content.brought is not None:
        bring(content.brought, folder)
    _write_json(folder / CONFIG, content.theirs)
    if not (folder / GENERATION).is_file():
        ids = {key: content.theirs[key] for key in IDS if content.theirs.get(key) is not None}
        _write_json(folder / GENERATION, ids)
    planned = content.weights.planned(content.dtype)
    files.write(folder, planned, content.weights.tensors(content.params, content.dtype))
    _read_back(folder, planned, content)
    (folder / "README.md").write_text(_card(name, planned, content))


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _read_back(folder: pathlib.Path, planned: list[files.Planned], content: Written) -> None:
    found = files.Tensors(folder)
    expected = content.weights.tensors(content.params, content.dtype)
    for each, tensor in zip(planned, expected, strict=True):
        read = found.read(each.name)
        if read.dtype != tensor.dtype or not np.array_equal(
                np.ascontiguousarray(read).view(np.uint8), tensor.view(np.uint8)):
            raise ValueError(f"{each.name} was not read back as it was written to {folder}")


def _card(name: str, planned: list[files.Planned], content: Written) -> str:
    count = sum(int(np.prod(each.shape)) for each in planned)
    kind = content.theirs["architectures"][0]
    task, auto = next(each for end, each in TASKS.items() if kind.endswith(end))
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\n---\n\n"
        f"# {name}\n\nA `{kind}` with {count:,} parameters in {content.dtype.name}, exported by "
        f"Batiste.\n\n```python\nfrom transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained("DIRECTORY")\n```\n\n'
        "`certificate.json` holds a fingerprint of its logits and the hash of every file;\n"
        "`batiste export --verify=DIRECTORY` checks both.\n"
    )
