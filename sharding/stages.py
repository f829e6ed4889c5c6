"""Which layers a pipeline stage holds, and where they are stored."""

import numpy as np


def layer_order(num_layers: int, stages: int, interleave: int) -> np.ndarray:
    """The layer at each place of a stacked parameter, int array L.

    A mesh splits a stack into contiguous parts. With interleaving, a stage's layers are not
    contiguous in depth (of 8 layers on 2 stages, 2 rounds: 0 1 4 5 and 2 3 6 7), so the stack is
    stored stage by stage, round by round. Raises ValueError if the layers do not divide.
    """
    chunks = stages * interleave
    if num_layers % chunks:
        raise ValueError(
            f"model.num_layers={num_layers} is not divisible by mesh.stage={stages} * "
            f"mesh.interleave={interleave}: choose a multiple of {chunks} layers, or fewer stages"
        )
    layers = np.arange(num_layers).reshape(interleave, stages, num_layers // chunks)
    return layers.swapaxes(0, 1).reshape(-1)


def reorder(num_layers: int, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """For each place of a new stack, the place in an old one that has its layer, int array L.

    old, new: (stages, interleave) of each.
    """
    return np.argsort(layer_order(num_layers, *old))[layer_order(num_layers, *new)]
