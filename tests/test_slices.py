"""Several slices = one device; only shares of gradients cross between them, and all bytes count."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from crossings import crossings, replica_groups
from step_checks import (
    BATCH, WIDE, alone, bytes_with_letter, check_equal, collectives, largest_error, parameters,
    place_batch, start, three_steps, train_config,
)

from batiste.configs.experiment import Experiment
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig, make_mesh

MESHES = [dict(slice=2, data=4), dict(slice=2, data=2, tensor=2)]
# Two slices of two devices, for laws that need no more.
FOUR = dict(slice=2, data=2)
SMALL = TransformerConfig(
    vocab_size=40, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=6, mlp_dim=24,
    max_length=16,
)


@pytest.mark.parametrize(
    "sizes,zero", [(MESHES[0], 0), (MESHES[0], 2), (MESHES[1], 1), (MESHES[1], 3)], ids=str)
def test_slices_equal_one_device(sizes, zero):
    run = three_steps(train_config("sgd"), MeshConfig(**sizes, zero=zero))
    check_equal(run, alone(train_config("sgd")))


def test_micro_batches_and_four_slices_equal_one_device():
    config = train_config("sgd", accumulation=2)
    run = three_steps(config, MeshConfig(slice=4, data=1, tensor=2, zero=1))
    check_equal(run, alone(train_config("sgd")))


def test_groups_are_read_in_every_notation():
    want = [[0, 4], [1, 5], [2, 6], [3, 7]]
    for text in ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "replica_groups=[4,2]<=[2,4]T(1,0)",
                 "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}",
                 "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}",
                 "replica_groups=mesh['data'=2,'stage'=1,'tensor'=4] {'stage','data'}",
                 "source_target_pairs={{0,4},{1,5},{2,6},{3,7}}"):
        assert replica_groups(text) == want
    assert replica_groups("replica_groups=[2,4]<=[8]") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(AssertionError, match="not known"):
        replica_groups("replica_groups=mesh['data'=8] {'data':(2)4}")


def parts(letters: str, sizes: dict[str, int]) -> int:
    """Among how many devices of a slice an array is split that is also split over data."""
    tensor = sizes.get("tensor", 1) if set(letters) & set("NKFV") else 1
    return tensor * (sizes["data"] if "D" in letters else 1)


def shares(program, sizes: dict[str, int]) -> list[tuple[str, int]]:
    """The letters of each parameter, and how many of its entries a device has a share of."""
    return [(name, leaf.size // parts(name, sizes)) for name, leaf in parameters(program)]


def compiled(config, sizes: dict[str, int], zero: int = 0, model=WIDE):
    """The program, the step, a batch, and the compiled text."""
    devices = jax.devices()[: math.prod(sizes.values())]
    mesh, program, step = start(config, MeshConfig(**sizes, zero=zero), devices, model)
    batch = place_batch(mesh)
    with jax.set_mesh(mesh):
        text = step.jitted.lower(program.abstract_state, batch).compile().as_text()
    return program, step, batch, text


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("sizes", [*MESHES, dict(slice=4, data=2)], ids=str)
def test_only_shares_of_gradients_cross_and_their_bytes_are_reported(sizes, zero):
    program, step, batch, text = compiled(train_config("sgd"), sizes, zero)
    slices = sizes["slice"]
    crossed = crossings(text, slices, 8)
    assert {kind for kind, *_ in crossed} == {"all-reduce"}
    entries = sum(size for _, size in shares(program, sizes)) + 4  # And four sums over rows.
    sent = 2 * (slices - 1) / slices * 4 * entries
    assert sum(size for _, size, _ in crossed) == sent
    assert entries < sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.params)) / 1.9
    assert float(step(program.initialize(), batch)[1]["slice_bytes"]) == sent
    if "tensor" not in sizes:  # Inside a slice: what is split is gathered once, and nothing else.
        inside = collectives(text)
        assert inside.pop("all-gather") == bytes_with_letter(program, "D")
        assert set(inside) == {"all-reduce"}


def test_words_and_places_are_looked_up_where_their_tables_lie():
    model = dataclasses.replace(
        SMALL, num_kv_heads=2, positions="learned", tied_embeddings=False, scale_embeddings=True)
    results = []
    for sizes in (dict(slice=2, data=2, tensor=2), dict(data=1)):
        program, step, batch, text = compiled(train_config("sgd"), sizes, model=model)
        state, metrics = step(program.initialize(), batch)
        results.append((float(metrics["loss"]), jax.device_get(state.params)))
        rows_of_a_slice = f"[4,{BATCH.tokens_BT.shape[1]},{SMALL.model_dim}]"
        assert f"{rows_of_a_slice}{{2,1,0}} all-gather" not in text
    (loss, params), (loss_alone, params_alone) = results
    np.testing.assert_allclose(loss, loss_alone, rtol=1e-6)
    assert largest_error(params, params_alone) <= 1e-6


@pytest.mark.parametrize("zero", [0, 1])
def test_gradients_of_micro_batches_are_summed_over_data_once(zero):
    """Scattered at the end of the step, and gathered again as gradients or as parameters."""
    program, _, _, text = compiled(train_config("sgd", accumulation=2), dict(data=4, tensor=2), zero)
    named = [(name, leaf.size * 4 // (2 if set(name) & set("NKFV") else 1))
             for name, leaf in parameters(program)]
    sizes = [size for _, size in named]
    split = sum(size for name, size in named if "D" in name)
    over_data = collectives("\n".join(
        line for line in text.splitlines()
        if "replica_groups" in line and replica_groups(line) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    ))
    assert over_data["reduce-scatter"] == split // 4
    assert over_data["all-gather"] == split
    # And four sums over rows; under ZeRO-1 the gradient's norm, of shares, is sums of scalars too.
    scalars = 4 * 4 + (8 * len(sizes) if zero else 0)
    assert sum(sizes) - split <= over_data.pop("all-reduce") <= sum(sizes) - split + scalars
    assert set(over_data) == {"reduce-scatter", "all-gather"}


def test_shares_that_do_not_divide_are_refused():
    experiment = Experiment()
    experiment.mesh = MeshConfig(slice=2, data=4)
    experiment.model.model_dim = 258
    with pytest.raises(ValueError, match="model.model_dim=258 .*mesh.data=4.*mesh.slice=2"):
        experiment.validate_on(8)
    with pytest.raises(ValueError, match="dim D of size 18.*mesh.data=4"):
        start(train_config("sgd"), MeshConfig(slice=2, data=4),
              model=dataclasses.replace(SMALL, model_dim=18))


def test_a_slice_is_devices_in_a_row():
    mesh = make_mesh(MeshConfig(slice=4, tensor=2))
    assert [[device.id for device in each.flat] for each in mesh.devices] == [
        [0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="does not fit the 8 devices"):
        make_mesh(MeshConfig(slice=3))
