"""The dead-field test: change a field, and a shape, a sharding, a number or a file must change."""

import pathlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from batiste.configs.experiment import Experiment, flatten
from batiste.configs.own_parts import load_own_parts
from batiste.data import RecordObjective, SourceConfig
from batiste.models import TransformerConfig

import field_probes as probes
from field_probes import change

# Equal sizes on purpose: eager evaluation compiles once for each shape.
MODEL = {
    "model.vocab_size": 8, "model.num_layers": 2, "model.model_dim": 8, "model.num_heads": 2,
    "model.num_kv_heads": 2, "model.head_dim": 4, "model.mlp_dim": 8, "model.max_length": 8,
    "train.num_steps": 10, "train.batch_size": 2, "train.schedule.warmup_steps": 4,
    "data.sequence_length": 8, "data.tokenizer": "bytes", "train.health.every": None,
}
BYTES = MODEL | {
    "model.vocab_size": 258, "model.num_layers": 1, "model.max_length": 16,
    "train.batch_size": 8, "train.num_steps": 4, "train.schedule.warmup_steps": 1,
    "train.checkpoint.every": 1, "train.evaluation.every": 2, "train.evaluation.max_batches": 1,
    "sample.max_tokens": 4,
}
# Nothing learns, so the validation loss never falls and patience has something to lose.
FROZEN = BYTES | {f"train.optimizer.{group}_multiplier": 0.0
                  for group in ("embedding", "head", "matrix", "vector")}
# In float16, so that the loss scale is alive.
HALF = MODEL | {"model.num_layers": 1, "model.dtype": "float16",
                "train.loss_scale.initial": 2.0**10, "train.loss_scale.growth_interval": 1}
TWO_STACKS = {"model.form": "encoder_decoder", "model.encoder_layers": 1,
              "data.objectives": (RecordObjective("prefix"),)}
ENCODER = {"model.form": "encoder", "data.objectives": (RecordObjective("masked"),)}
DISCRIMINATOR = {"model.form": "encoder", "model.discriminator": True,
                 "data.objectives": (RecordObjective("replaced"),)}
EXPERTS = {"model.num_experts": 4}
RECURRENCE = f"{pathlib.Path(__file__).parents[1]}/docs/extend/recurrent.py:GatedRecurrence"
load_own_parts(Experiment(TransformerConfig(mixer=RECURRENCE)))
LATENT = {"model.latent_rank": 5, "model.rope_dim": 2, "model.value_dim": 3}
LLAMA3 = {"model.rope_scaling": "llama3", "model.rope_original_length": 16}
BASES = {
    probes.shapes: MODEL, probes.logits: MODEL, probes.step_text: MODEL, probes.start: MODEL,
    probes.two_steps: HALF, probes.rates: MODEL, probes.updates: MODEL,
    probes.watched: MODEL | {"train.health.every": 1}, probes.tpu_step_text: MODEL,
    probes.exchanged: MODEL | {"mesh.slice": 2, "train.local.steps": 1},
    probes.pipeline_text: MODEL | {"model.num_layers": 4, "train.batch_size": 16, "mesh.stage": 2,
                                   "mesh.micro_batches": 2},
    probes.layout: MODEL | {"train.batch_size": 8}, probes.records: BYTES,
    probes.first_batch: BYTES, probes.run: FROZEN, probes.generated: FROZEN,
    probes.failed_saves: MODEL,
}


class Case(NamedTuple):
    """A probe that sees the field, another value for it, and what must be set for it to count."""

    probe: Callable
    value: Any
    base: dict[str, Any] = {}


def cases(probe: Callable, prefix: str, values: dict[str, Any]) -> dict[str, Case]:
    """A case for each field: its other value, or that and the base it needs."""
    return {prefix + name: Case(probe, *value) if isinstance(value, tuple) else Case(probe, value)
            for name, value in values.items()}


CASES = {
    **cases(probes.shapes, "model.", {
        "vocab_size": 16, "num_layers": 3, "model_dim": 16, "num_heads": 4, "num_kv_heads": 1,
        "head_dim": 8, "mlp_dim": 16, "max_length": (32, {"model.positions": "learned"}),
        "bias": "qkv", "qk_norm": True, "embedding_norm": True, "attention_sinks": True,
        "tied_embeddings": False, "num_experts": 4, "shared_experts": (1, EXPERTS),
        "router_bias": (True, EXPERTS), "latent_rank": (6, LATENT),
        "dense_layers": (1, EXPERTS | {"model.num_layers": 3, "model.dense_layers": 2,
                                       "model.dense_mlp_dim": 12}),
        "dense_mlp_dim": (16, EXPERTS | {"model.dense_layers": 1, "model.dense_mlp_dim": 12}),
        "query_rank": (6, LATENT), "value_dim": (4, LATENT),
        "mixer": (RECURRENCE, {"model.positions": "none"}), "token_types": 2, "head_transform": True, "future_heads": 1, "shared_layers": True,
        "embedding_dim": (6, {"model.head_transform": True}),
        "encoder_layers": (3, TWO_STACKS), "generator_heads": (1, DISCRIMINATOR),
    }),
    **cases(probes.logits, "model.", {
        "activation": "geglu", "norm": "layer", "norm_placement": "sandwich",
        "norm_epsilon": 1e-2, "positions": "sinusoidal", "rope_base": 100.0,
        "rope_scaling": "linear", "rope_factor": (4.0, {"model.rope_scaling": "linear"}),
        "rope_original_length": (20, LLAMA3),
        "layer_pattern": (("local", "global"), {"model.window": 2, "model.layer_pattern":
                                                ("global", "local")}),
        "window": (3, {"model.window": 2, "model.layer_pattern": ("local",)}),
        "local_rope_base": (100.0, {"model.window": 2, "model.layer_pattern": ("local",)}),
        "attention_scale": 0.1, "attention_soft_cap": 0.5, "logit_soft_cap": 0.5, "scale_embeddings": True, "scale_logits": True,
        "rope_dim": (4, LATENT | {"model.head_dim": 8}),
        "expert_groups": (2, EXPERTS),
        "groups_per_token": (2, EXPERTS | {"model.expert_groups": 2}),
        "routed_scale": (2.5, EXPERTS), "experts_per_token": (1, EXPERTS), "expert_scores": ("sigmoid", EXPERTS),
        "dropout": 0.5, "init_stddev": 0.02, "depth_scaled_init": False, "dtype": "bfloat16",
    }),
    **cases(probes.step_text, "", {
        "model.remat": "full", "model.scan_unroll": 2, "train.accumulation": 2,
        "model.saved": (("up",), {"model.remat": "names"}),
        "train.objective.loss_chunk": 4, "train.faults": "frozen:step=4",
    }),
    **cases(probes.tpu_step_text, "", {
        "model.offloaded": (("up",), {"model.remat": "names"}),
        "model.attention": "v6e", "train.objective.fused": (True, {"model.attention": "v6e"}),
    }),
    **cases(probes.two_steps, "train.", {
        "objective.label_smoothing": 0.1, "objective.z_loss": 0.1,
        "objective.balance_loss": (0.1, EXPERTS), "objective.router_z_loss": (0.1, EXPERTS),
        "optimizer.router_bias_rate": (0.1, EXPERTS | {"model.router_bias": True}),
        "loss_scale.initial": 2.0**24, "loss_scale.growth_interval": 2,
        "loss_scale.maximum": 2.0**10,
        "loss_scale.minimum": (2.0**24, {"train.loss_scale.initial": 2.0**24}),
    }),
    **cases(probes.rates, "train.schedule.", {
        "kind": "linear", "learning_rate": 2e-3, "warmup": "exponential", "warmup_steps": 2,
        "final_fraction": 0.5,
        "decay_steps": (3, {"train.schedule.kind": "warmup_stable_decay",
                            "train.schedule.decay_steps": 2}),
        "step_every": (3, {"train.schedule.kind": "step", "train.schedule.step_every": 2,
                           "train.schedule.step_factor": 0.5}),
        "step_factor": (0.25, {"train.schedule.kind": "step", "train.schedule.step_every": 2,
                               "train.schedule.step_factor": 0.5}),
    }),
    **cases(probes.updates, "train.optimizer.", {
        "kind": "lion", "beta1": 0.5, "beta2": 0.5, "epsilon": 0.1,
        "momentum": (0.5, {"train.optimizer.kind": "sgd"}), "weight_decay": 0.0,
        "clip_norm": (None, {"train.optimizer.kind": "sgd"}),
        "clip_value": (0.1, {"train.optimizer.kind": "sgd", "train.optimizer.clip_norm": None}),
        "embedding_multiplier": 0.5, "head_multiplier": (0.5, {"model.tied_embeddings": False}),
        "matrix_multiplier": 0.5, "vector_multiplier": 0.5,
    }),
    **cases(probes.start, "train.", {"seed": 1}),
    **cases(probes.watched, "train.", {
        "health.every": (2, {"train.health.every": 1}), "health.window": 16, "health.roll_back": 3,
        "health.policies": "loss_spike=stop", "health.replicas_every": 2,
    }),
    **cases(probes.layout, "mesh.", {
        "slice": 2, "stage": 2, "context": 2, "expert": (2, EXPERTS), "data": (8, {"mesh.tensor": 2}),
        "tensor": 2, "zero": 3, "offload_optimizer": True,
        "context_exchange": ("all_to_all", {"mesh.context": 2}),
    }),
    **cases(probes.layout, "model.", {"form": "encoder", "discriminator": (True, ENCODER)}),
    **cases(probes.pipeline_text, "mesh.", {"micro_batches": 4, "interleave": 2}),
    **cases(probes.layout, "train.local.", {"steps": (2, {"mesh.slice": 2})}),
    **cases(probes.exchanged, "train.local.", {
        "outer_learning_rate": 0.5, "outer_momentum": 0.5, "compression": "int8",
        "kept_fraction": (0.5, {"train.local.compression": "top_k"}),
    }),
    **cases(probes.records, "data.", {
        "sources[0].path": "CORPUS/b/*.txt", "sources[0].weight": 5.0,
        "sources[0].text_field": ("body", {"data.sources[0].path": "CORPUS/c.jsonl"}),
        "validation_fraction": 0.4, "tokenizer": ("characters", {"model.vocab_size": 300}),
        "vocab_size": (262, {"data.tokenizer": "characters", "data.vocab_size": 300,
                             "model.vocab_size": 300}),
        "sequence_length": 9, "packing": "first_fit",
        "validation_sources": (("{}/c.jsonl",), {}),
        "normalize": (True, {"data.sources[0].path": "CORPUS/d/*.txt"}),
    }),
    **cases(probes.first_batch, "", {
        "train.batch_size": 16, "data.seed": 1,
        "data.objectives": ((RecordObjective("prefix"),), {}),
    }),
    **cases(probes.run, "", {
        "train.num_steps": 3, "train.checkpoint.every": 4, "train.checkpoint.keep": 1,
        "train.checkpoint.keep_every": 1, "train.checkpoint.keep_best": 1,
        "train.evaluation.every": 1,
        "train.evaluation.max_batches": None, "train.evaluation.samples": True,
        "train.stop.patience": 1, "train.stop.flops": 1.0,
        "sample.prompts": (("the",), {"sample.prompts": ("ab", "the")}),
    }),
    **cases(probes.failed_saves, "train.checkpoint.", {"max_failures": 2}),
    **cases(probes.generated, "sample.", {
        "temperature": 0.0, "top_k": 1, "top_p": 0.1, "seed": 1, "max_tokens": 2,
    }),
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """(probe, changes) -> what the probe sees, each computed once unless asked again."""
    # Thousands of operations, each compiled in milliseconds: worth keeping for the next time.
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    corpus, seen = tmp_path_factory.mktemp("corpus"), {}
    draw = random.Random(0)

    def text(words):
        return " ".join(draw.choice(words.split()) for _ in range(40))

    for folder, words in (("a", "the ab cd tree"), ("b", "fox jumps over q"),
                          ("d", "cafe\u0301 a\u030a")):
        (corpus / folder).mkdir()
        for number in range(30):
            (corpus / folder / f"{number}.txt").write_text(text(words))
    (corpus / "c.jsonl").write_text("".join(
        f'{{"text": "{text("one two three")}", "body": "{text("four five six")}"}}\n'
        for _ in range(30)))

    def look(probe, changes, again=False):
        changes = BASES[probe] | changes
        key = probe.__name__, repr(sorted(changes.items()))
        if again or key not in seen:
            experiment = Experiment()
            experiment.data.sources = (SourceConfig(path=f"{corpus}/a/*.txt"),
                                       SourceConfig(path=f"{corpus}/b/*.txt"))
            for name, value in changes.items():
                if name == "data.validation_sources":
                    value = tuple(SourceConfig(path.format(corpus)) for path in value)
                value = value.replace("CORPUS", str(corpus)) if isinstance(value, str) else value
                change(experiment, name, value)
            if probe is not probes.layout:
                experiment.validate()
            seen[key] = probe(experiment, corpus)
        return seen[key]

    yield look
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def same(one: Any, other: Any) -> bool:
    """Whether two outcomes have the same structure and equal leaves, dtypes included."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) and np.asarray(a).dtype == np.asarray(b).dtype
               for a, b in pairs)


def test_the_table_has_every_field():
    assert sorted(CASES) == sorted(flatten(Experiment()))


@pytest.mark.parametrize("probe", BASES, ids=lambda probe: probe.__name__)
def test_a_probe_sees_no_difference_where_there_is_none(probe, outcome):
    assert same(outcome(probe, {}), outcome(probe, {}, again=True))


@pytest.mark.parametrize("field", CASES)
def test_a_field_matters(field, outcome):
    probe, value, base = CASES[field]
    before, after = outcome(probe, base), outcome(probe, base | {field: value})
    assert not same(before, after), f"{field} changes nothing that {probe.__name__} sees"
    if isinstance(after, str) and probe is probes.layout:
        assert field in after, f"the refusal does not name {field}: {after}"
