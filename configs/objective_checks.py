"""Which objectives, forms of model and meshes go together; what is not proven is refused here."""

from batiste.data import DataConfig, kinds_of, target_length
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig
from batiste.train import TrainConfig


def check_objectives(
    model: TransformerConfig, data: DataConfig, mesh: MeshConfig, train: TrainConfig
) -> None:
    """Raises ValueError, naming the field and a fix, for objectives that cannot be learned so."""
    kinds = tuple(objective.kind for objective in data.objectives) or ("causal",)
    for kind in kinds:
        if kind not in kinds_of(model.form):
            raise ValueError(
                f"data.objectives of kind {kind!r} are not learned by model.form={model.form!r}: "
                f"choose among {', '.join(kinds_of(model.form))}, or another model.form"
            )
    if "order" in kinds and model.token_types is None:
        raise ValueError(
            "model.token_types=None, but data.objectives of kind 'order' tell the halves of a "
            "document apart: set model.token_types=2"
        )
    _check_replaced(model, kinds)
    for index, objective in enumerate(data.objectives):
        if objective.mode is not None and model.form != "encoder_decoder":
            raise ValueError(
                f"data.objectives[{index}].mode={objective.mode!r} is read by an encoder before "
                f"what is written, but model.form={model.form!r}: set it to None"
            )
    prefixed = model.form == "decoder" and "prefix" in kinds
    if model.future_heads and prefixed:
        raise ValueError(
            f"model.future_heads={model.future_heads} count along rows, which data.objectives of "
            "kind 'prefix' rearrange: set it to 0"
        )
    if prefixed:
        _check_places(model)
    for named, given in (
        (f"model.form={model.form!r}", model.form != "decoder"),
        ("model.positions='relative'", model.positions == "relative"),
        ("data.objectives of kind 'prefix'", prefixed),
        ("model.shared_layers=True", model.shared_layers),
        (f"model.future_heads={model.future_heads}", model.future_heads > 0),
        (f"model.mixer={model.mixer!r}", model.mixer != "attention"),
        *((f"model.layer_pattern of {kind!r}", kind not in ("global", "local"))
          for kind in model.layer_pattern),
    ):
        for axis in ("slice", "stage", "context"):
            if given and getattr(mesh, axis) > 1:
                raise ValueError(
                    f"mesh.{axis}={getattr(mesh, axis)} does not know {named}: set mesh.{axis}=1")
    if model.shared_layers and train.faults is not None:
        raise ValueError(
            f"train.faults={train.faults!r} is of one layer, and model.shared_layers=True has no "
            "other: leave one of them out"
        )
    for field in ("loss_chunk", "fused"):
        for head in ("head_transform", "discriminator"):
            if getattr(model, head) and getattr(train.objective, field):
                raise ValueError(
                    f"train.objective.{field}={getattr(train.objective, field)} does not know the "
                    f"logits of model.{head}=True: leave one of them out"
                )
    length = target_length(data)
    if model.form == "encoder_decoder" and length % mesh.tensor:
        raise ValueError(
            f"data.sequence_length={data.sequence_length} makes rows of {length} tokens for the "
            f"decoder, which mesh.tensor={mesh.tensor} does not divide: choose a multiple of "
            f"{8 * mesh.tensor}"
        )


def _check_replaced(model: TransformerConfig, kinds: tuple[str, ...]) -> None:
    """A discriminator learns which tokens were replaced, all of the time, and nothing else does."""
    for kind in kinds:
        if model.discriminator != (kind == "replaced"):
            raise ValueError(
                f"data.objectives of kind {kind!r} are not learned by model.discriminator="
                f"{model.discriminator}: give all of them kind 'replaced' with "
                "model.discriminator=True and model.generator_heads, or none of them"
            )


def _check_places(model: TransformerConfig) -> None:
    """A prefix puts the beginnings of all documents first, so places in a row say nothing."""
    for field, value, refused in (
        ("positions", model.positions, ("alibi", "relative")),
        ("window", model.window, (model.window,) if model.window is not None else ()),
    ):
        if value in refused:
            raise ValueError(
                f"model.{field}={value!r} goes by places in a row, which data.objectives of kind "
                f"'prefix' rearrange: choose another model.{field}"
            )
