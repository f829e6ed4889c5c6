"""Objectives, optimizers, the step, the loop, and everything a run writes down.

A name is imported when it is first asked for: what reads a work directory afterwards, or waits
beside a run, neither waits for jax nor holds 200 MB of it.
"""

import importlib

_MODULES = {
    "account": ("Account", "read_account"),
    "batch_sizes": ("batch_sizes_of", "records_before", "with_batch_size"),
    "checkpoint": ("Checkpoints",),
    "decisions": (
        "Decision", "RollBack", "all_decisions", "decide", "decided", "decisions_of", "roll_back",
        "skipped", "start_of", "steered",
    ),
    "diagnosis": ("diagnose", "write_diagnosis"),
    "faults": ("faulty_batches", "parse_fault"),
    "finished": ("FINISHED", "how_to_go_on", "measured_at_end", "why_ended"),
    "config": ("ObjectiveConfig", "TrainConfig"),
    "flops": ("flops_per_token", "total_peak_flops"),
    "ledger": ("Ledger", "compilation_booked", "last_saved"),
    "lines": ("complain",),
    "lock": ("work_directory_lock",),
    "loop": ("Records", "Run", "fit"),
    "manifest": ("Found",),
    "metrics": ("MetricsWriter",),
    "monitor": ("Monitor", "Watched"),
    "objectives": ("batch_loss",),
    "optimizer": ("OWN_KINDS",),
    "progress": ("Progress", "mfu_formula_line"),
    "replaced": ("ReplacedTerms",),
    "replicas": ("Replicas",),
    "report": ("ReportFacts", "write_report"),
    "resume": ("RESUME_MODES", "arrays_of", "check_mode", "check_override", "check_same"),
    "samples": ("write_samples",),
    "state": ("Program", "TrainState", "from_checkpoint", "make_program"),
    "step": ("make_train_step",),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_PLACES)


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
