"""Replicas of the training state that differ are found, named, and stopped for or repaired."""

import random

import jax
import numpy as np
import pytest
from step_checks import WIDE, train_config

from batiste import main
from batiste.configs.experiment import Experiment
from batiste.data import DataConfig, SourceConfig
from batiste.inference import SamplingConfig
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig, make_mesh
from batiste.train import Replicas, make_program
from batiste.train.health import HealthConfig, parse_policies, replica_policy
from batiste.train.ledger import read_ledger

LAYOUTS = {
    "data": MeshConfig(data=8),
    "zero 1, offloaded": MeshConfig(data=4, tensor=2, zero=1, offload_optimizer=True),
    "zero 3, slices": MeshConfig(slice=4, data=2, zero=3),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def laid_out(request):
    """A mesh, a program and its state before the first step."""
    layout = LAYOUTS[request.param]
    mesh = make_mesh(layout)
    program = make_program(WIDE, train_config("adamw"), mesh, layout)
    return mesh, program, program.initialize()


def damaged(leaf: jax.Array, device: jax.Device) -> jax.Array:
    """The array with its lowest bit flipped in one place on one device."""
    parts = []
    for shard in leaf.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            data.view(np.uint32).reshape(-1)[-1:] ^= 1
        place = jax.sharding.SingleDeviceSharding(
            shard.device, memory_kind=leaf.sharding.memory_kind)
        parts.append(jax.device_put(data, place))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def replaced(state, index: int, leaf):
    leaves, structure = jax.tree.flatten(state)
    leaves[index] = leaf
    return jax.tree.unflatten(structure, leaves)


def bits(state) -> list[bytes]:
    """Every part of every array."""
    return [np.array(shard.data).tobytes() for leaf in jax.tree.leaves(state)
            for shard in leaf.addressable_shards]


def test_one_bit_is_found_named_and_repaired_on_any_mesh(laid_out):
    mesh, program, state = laid_out
    device, said = mesh.devices.flat[5], []
    config = HealthConfig(policies="replicas_differ=repair,plateau=log")
    mends = Replicas(config, mesh, program.abstract_state,
                     lambda event, **fields: said.append((event, fields)))
    stops = Replicas(HealthConfig(), mesh, program.abstract_state, latest=lambda: 40)
    assert stops.check(1, state) is state and mends.check(1, state) is state and not said
    paths = [jax.tree_util.keystr(path, simple=True, separator=".")
             for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    compared = set()
    # The step's number, what ZeRO splits of the parameters, a whole one, one of the optimizer.
    for number, index in enumerate((0, 1, paths.index("params.layers.attention.query_norm.scale_H"),
                                    len(paths) - 1), start=2):
        leaf = jax.tree.leaves(state)[index]
        replicas = 8 // len({repr(index) for index in leaf.sharding.devices_indices_map(
            leaf.shape).values()})
        broken = replaced(state, index, damaged(leaf, device))
        if replicas == 1:
            assert stops.check(number, broken) is broken
            continue
        compared.add(paths[index])
        with pytest.raises(ValueError, match=f"after step {number}.*{paths[index]}.*device") as error:
            stops.check(number, broken)
        assert f"device {device.id} " in str(error.value) and "newest is of step 40" in str(error.value)
        assert "\n" not in str(error.value)
        if replicas == 2:  # Which of the two is right, nobody knows.
            with pytest.raises(ValueError, match="no majority"):
                mends.check(number, broken)
            continue
        assert bits(mends.check(number, broken)) == bits(state) != bits(broken)
        event, fields = said[-1]
        assert event == "replicas_differ" and fields["action"] == "repair"
        assert paths[index] in fields["what"] and f"device {device.id} " in fields["what"]
    assert len(compared) >= 2


def test_the_policy_is_read_beside_the_others():
    assert replica_policy("") == replica_policy("replicas_differ=stop") == "stop"
    assert replica_policy("plateau=lower, replicas_differ=repair") == "repair"
    assert parse_policies("replicas_differ=repair") == parse_policies("")
    with pytest.raises(ValueError, match="replicas_differ: expected one of stop, repair, got 'skip'"):
        parse_policies("replicas_differ=skip")
    with pytest.raises(ValueError, match="train.health.replicas_every=0"):
        HealthConfig(replicas_every=0).validate()


def test_a_flipped_bit_stops_a_run_at_the_next_look_and_a_repaired_one_goes_on(tmp_path):
    draw = random.Random(0)
    for number in range(8):
        text = " ".join(draw.choice("abcdefg") * 3 for _ in range(100))
        (tmp_path / f"{number}.txt").write_text(text)
    experiment = Experiment(
        model=TransformerConfig(
            vocab_size=262, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
            mlp_dim=16, max_length=8),
        data=DataConfig(sources=(SourceConfig(path=f"{tmp_path}/*.txt"),),
                        tokenizer="bytes", sequence_length=8, validation_fraction=0.5),
        sample=SamplingConfig(prompts=()))
    train = experiment.train
    train.num_steps, train.batch_size, train.schedule.warmup_steps = 8, 8, 1
    train.checkpoint.every, train.evaluation.every, train.evaluation.max_batches = 2, 100, 1
    train.health.every, train.health.replicas_every = None, 3
    train.faults = "flipped_bit:step=5:device=6"
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match="differ after step 6: params.*device 6 .*is of step 4"):
        main.train(experiment, workdir)
    train.health.policies = "replicas_differ=repair"
    assert main.train(experiment, workdir).step == 8
    events = [event for event in read_ledger(workdir) if event["event"] == "replicas_differ"]
    assert [(event["step"], event["action"]) for event in events] == [(6, "stop"), (6, "repair")]
