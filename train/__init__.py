"""Objectives, optimizers, the step, the loop, and everything a run writes down."""

from batiste.train.checkpoint import Checkpoints
from batiste.train.config import ObjectiveConfig, TrainConfig
from batiste.train.flops import flops_per_token, total_peak_flops
from batiste.train.decisions import (
    Decision, RollBack, decide, decided, decisions_of, roll_back, skipped, start_of, steered,
)
from batiste.train.diagnosis import diagnose, diagnosis
from batiste.train.faults import faulty_batches, parse_fault
from batiste.train.ledger import Ledger
from batiste.train.loop import Records, Run, fit
from batiste.train.metrics import MetricsWriter, Progress, mfu_formula_line
from batiste.train.monitor import Monitor, Watched
from batiste.train.objectives import causal_loss
from batiste.train.report import ReportFacts, write_report
from batiste.train.resume import RESUME_MODES, check_mode, check_same
from batiste.train.state import Program, TrainState, from_checkpoint, make_program
from batiste.train.step import make_train_step

__all__ = [
    "Checkpoints", "Decision", "Ledger", "MetricsWriter", "Monitor", "ObjectiveConfig",
    "Program", "Progress", "RESUME_MODES", "Records", "ReportFacts", "RollBack", "Run",
    "TrainConfig", "TrainState", "Watched", "causal_loss", "check_mode", "check_same", "decide",
    "decided", "decisions_of", "diagnose", "diagnosis", "faulty_batches", "fit", "flops_per_token", "from_checkpoint", "make_program",
    "make_train_step", "mfu_formula_line", "parse_fault", "roll_back", "skipped", "start_of", "steered",
    "total_peak_flops", "write_report",
]
