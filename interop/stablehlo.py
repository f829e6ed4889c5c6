"""A model as StableHLO: programs and weights that JAX, or whatever reads StableHLO, runs without us.

The programs take the weights as a list, in the order of `program.json`, so that they hold no copy of
them, and any number of rows.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from batiste.interop.files import Planned, write
from batiste.models import Cache, Transformer, TransformerConfig

PROGRAM, FORWARD, DECODE, CARD = "program.json", "forward.bin", "decode.bin", "README.md"
PLATFORMS = ("cpu", "cuda", "tpu")
TEXT = """# {name} as StableHLO

Two programs for any number of rows, for {platforms}, that need JAX and safetensors alone:

```python
import json, jax, numpy as np
from safetensors.numpy import load_file

files = load_file("model.safetensors")
weights = [files[name] for name in json.load(open("program.json"))["weights"]]
forward = jax.export.deserialize(open("forward.bin", "rb").read())
tokens = np.array([[1, 2, 3]], np.int32)
logits = forward.call(weights, tokens)  # rows × tokens × {vocab_size}, float32
```

`decode.bin` takes weights, one token of each row, keys, values and the number of tokens that each row has so far; it
returns logits and the last three anew. They begin as zeros of the shapes in `program.json`, where "rows" is yours to
choose. At most {max_length} tokens fit.
"""


def write_stablehlo(folder: pathlib.Path, config: TransformerConfig, params: Any, name: str) -> int:
    """Writes programs, weights and their description; returns the bytes of the weights.

    Raises ValueError for a model that is no decoder, and without the package flatbuffers.
    """
    if config.form != "decoder":
        raise ValueError(f"model.form={config.form!r}: only a decoder is exported as StableHLO")
    # The programs are for several platforms, and a kernel is one chip's.
    config = dataclasses.replace(config, attention="reference", remat="none", saved=(), offloaded=())
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.split(abstract, nnx.Param)
    named, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [".".join(str(part.key) for part in path) for path, _ in named]
    leaves = [leaf for _, leaf in named]
    planned = [Planned(each, np.dtype(leaf.dtype), leaf.shape)
               for each, leaf in zip(names, leaves, strict=True)]
    write(folder, planned, map(np.asarray, leaves))
    weights = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in planned]

    def model_of(weights: list[jax.Array]) -> Transformer:
        return nnx.merge(graphdef, structure.unflatten(weights))

    cache = _exported(folder, model_of, weights, config)
    described = {
        "weights": names, "max_length": config.max_length, "vocab_size": config.vocab_size,
        "cache": [{"shape": ["rows" if size is None else size for size in shape], "dtype": str(dtype)}
                  for shape, dtype in cache],
    }
    (folder / PROGRAM).write_text(json.dumps(described, indent=1) + "\n")
    (folder / CARD).write_text(TEXT.format(
        name=name, platforms=", ".join(PLATFORMS), vocab_size=config.vocab_size,
        max_length=config.max_length))
    return sum(each.bytes for each in planned)


def _exported(
    folder: pathlib.Path, model_of: Callable, weights: list, config: TransformerConfig
) -> list[tuple]:
    """Writes both programs; returns the shapes, None for rows, and dtypes of what decoding keeps."""
    rows, length = export.symbolic_shape("rows, length")

    def forward(weights: list, tokens_BT: jax.Array) -> jax.Array:
        return model_of(weights)(tokens_BT)

    def decode(weights: list, token_B: jax.Array, *cache: jax.Array) -> tuple:
        model = model_of(weights)
        x_BTD, after = model.extend(token_B[:, None], Cache(*cache))
        return model.logits(x_BTD)[:, 0], *after[:3]

    empty = jax.eval_shape(lambda weights: model_of(weights).empty_cache(
        1, config.max_length), weights)[:3]
    places = (1, 1, 0)  # Which dim of keys, values and lengths has the rows.
    cache = [((*leaf.shape[:at], None, *leaf.shape[at + 1:]), leaf.dtype)
             for leaf, at in zip(empty, places, strict=True)]
    kept = [jax.ShapeDtypeStruct(tuple(rows if size is None else size for size in shape), dtype)
            for shape, dtype in cache]
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    token = jax.ShapeDtypeStruct((rows,), jnp.int32)
    for file, program, given in ((FORWARD, forward, (tokens,)), (DECODE, decode, (token, *kept))):
        exported = export.export(jax.jit(program), platforms=PLATFORMS)(weights, *given)
        try:
            (folder / file).write_bytes(exported.serialize())
        except ImportError:
            raise ValueError(
                "format=stablehlo needs the package flatbuffers: pip install 'batiste[hf]'") from None
    return cache
