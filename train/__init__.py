"""Objectives, optimizers, the step, the loop, and everything a run writes down."""

from batiste.train.checkpoint import Checkpoints
from batiste.train.config import ObjectiveConfig, TrainConfig
from batiste.train.flops import flops_per_token, total_peak_flops
from batiste.train.ledger import Ledger, last_saved
from batiste.train.loop import Records, Run, fit
from batiste.train.manifest import Found
from batiste.train.metrics import MetricsWriter, Progress, mfu_formula_line
from batiste.train.objectives import causal_loss
from batiste.train.report import ReportFacts, write_report
from batiste.train.resume import (
    RESUME_MODES, arrays_of, check_mode, check_override, check_same,
)
from batiste.train.state import Program, TrainState, from_checkpoint, make_program
from batiste.train.step import make_train_step

__all__ = [
    "Checkpoints", "Found", "Ledger", "MetricsWriter", "ObjectiveConfig", "Program", "Progress",
    "RESUME_MODES", "Records", "ReportFacts", "Run", "TrainConfig", "TrainState", "arrays_of",
    "causal_loss", "check_mode", "check_override", "check_same", "fit", "flops_per_token",
    "from_checkpoint", "last_saved", "make_program", "make_train_step", "mfu_formula_line",
    "total_peak_flops", "write_report",
]
