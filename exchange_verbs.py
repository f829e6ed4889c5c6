"""The verbs import and export: models of other libraries."""

from absl import flags

from batiste.verb_flags import (
    define_config, define_trust, define_workdir, define_written_workdir, given_experiment, required,
    trust,
)


def define_import(values: flags.FlagValues, argv: list[str]) -> None:
    """The flags of `batiste import`."""
    define_config(values, argv)
    define_written_workdir(values)
    flags.DEFINE_string("from", None, "Directory of a model in Hugging Face's format, the "
                        ".safetensors file in it, or a .gguf file.", flag_values=values)


def import_(values: flags.FlagValues) -> int:
    """`batiste import`."""
    from batiste import main

    experiment = None if values.config is None else given_experiment(values)
    workdir = required(values, "workdir")
    experiment = main.import_weights(
        required(values, "from"), workdir, experiment, values.break_lock)
    verb = "embed" if experiment.model.form == "encoder" else "generate"
    print(f"imported: next, batiste {verb} --workdir={workdir}")
    return 0


def define_export(values: flags.FlagValues, argv: list[str]) -> None:
    """The flags of `batiste export`."""
    del argv
    define_workdir(values)
    define_trust(values)
    flags.DEFINE_string("to", None, "Directory to write.", flag_values=values)
    flags.DEFINE_string("verify", None, "Directory that an export wrote, to check against its "
                        "certificate, instead of --workdir and --to.", flag_values=values)
    flags.DEFINE_string("family", None, "The model_type to write; left out: the one it was imported "
                        "as, or the first that fits.", flag_values=values)
    flags.DEFINE_enum("format", "transformers", ("transformers", "stablehlo"), "Weights that "
                      "transformers loads, or weights and programs that JAX runs without Batiste.",
                      flag_values=values)
    flags.DEFINE_enum("part", None, ("generator", "discriminator"), "Which model of a run that "
                      "trains both (model.generator_heads).", flag_values=values)
    flags.DEFINE_enum("dtype", None, ("float32", "bfloat16", "float16"), "Of the files; left out: "
                      "the model's compute dtype.", flag_values=values)


def export(values: flags.FlagValues) -> int:
    """`batiste export`."""
    from batiste import exchange, main
    from batiste.interop.stablehlo import PLATFORMS

    if values.verify is not None:
        if values.workdir is not None or values.to is not None:
            raise ValueError("--verify checks a directory by itself: leave --workdir and --to out")
        error = exchange.verify_export(values.verify)
        print(f"{values.verify}: every file is what was written, and logits differ by {error:.1e} "
              "of the largest")
        return 0
    workdir, target = trust(values), required(values, "to")
    if values.format == "stablehlo":
        for flag in ("family", "dtype", "part"):
            if getattr(values, flag) is not None:
                raise ValueError(f"--{flag} is of --format=transformers: leave it out")
        size = main.export_program(workdir, target)
        print(f"{target}: programs for {', '.join(PLATFORMS)}, and {size:,} bytes of weights")
        return 0
    done = main.export_weights(workdir, target, values.family, values.dtype, values.part)
    print(f"{target}: {done['tensors']:,} tensors, {done['bytes']:,} bytes, read back and the same")
    return 0
