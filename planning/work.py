"""What a layer has alive while its backward pass runs, beside what was kept for it."""

from batiste.models import TransformerConfig
from batiste.planning.saved import expert_rows
from batiste.planning.workload import Choice

# Kernels pad the last dim of an array to the 128 lanes of a vector register.
LANES = 128


def work_of_token(model: TransformerConfig, length: int, choice: Choice) -> float:
    """Bytes for each token of a micro-batch: of the feed-forward or of attention, the larger."""
    item = 4 if model.dtype == "float32" else 2
    return max(_feed_forward(model, choice, item), _attention(model, length, choice, item))


def _feed_forward(model: TransformerConfig, choice: Choice, item: int) -> float:
    """Each projection and its gradient; x in, its gradient, x itself in fp32; and what attention's
    backward pass will need, if it was recomputed."""
    tensor, recomputes = choice.mesh.tensor, choice.remat != "none"
    rows = expert_rows(model, choice.mesh.expert)
    shared = model.shared_experts if model.num_experts else 0
    projections = (2 if model.gated else 1) * (rows + shared)
    units = projections * model.mlp_dim
    if model.dense_mlp_dim is not None:  # Layers of two sizes: of the one that takes more.
        units = max(units, (2 if model.gated else 1) * model.dense_mlp_dim)
    alive = units * (2 if recomputes else 1) * item / tensor
    if model.num_experts is not None:
        alive += 2 * item * rows * model.model_dim  # To the experts and back.
    # Where `tensor` splits time between blocks, x of both blocks, what leaves the second one and
    # its gradient are gathered.
    alive += ((4 if tensor > 1 else 2) * item + 5 / tensor) * model.model_dim
    heads, keys = _dims(model, tensor)
    return alive + recomputes * item * 2 * (heads + keys * _padding(model))


def _attention(model: TransformerConfig, length: int, choice: Choice, item: int) -> float:
    """Queries, keys, values, outputs and their gradients."""
    tensor, padding = choice.mesh.tensor, _padding(model)
    heads, keys = _dims(model, tensor)
    if model.attention == "reference":
        probabilities = 3 * 4 * model.num_heads / tensor * length
        alive = item * 3 * (heads + keys) + probabilities
    else:
        # As they are and in the kernels' layouts, which pad half of them; dq, dk and dv leave the
        # kernel in fp32.
        alive = heads * (item * (4 + 2 * padding) + 4)
        alive += keys * (item * (1 + 2 * padding) + 8 * padding)
    # Where `tensor` splits time between blocks, x and the gradient of what leaves are gathered.
    gathered = 2 * item if tensor > 1 else 0
    return alive + (gathered + 2 / tensor) * model.model_dim


def _dims(model: TransformerConfig, tensor: int) -> tuple[float, float]:
    """Query and key dims of a device."""
    heads, keys = model.num_heads / tensor, model.num_kv_heads / tensor
    return heads * model.head_dim, keys * model.head_dim


def _padding(model: TransformerConfig) -> float:
    return -(-model.head_dim // LANES) * LANES / model.head_dim
