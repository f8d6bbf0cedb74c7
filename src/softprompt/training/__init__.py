"""Train soft prompts on a frozen base. Knows neither the engine, nor the server, nor the disk."""

from softprompt.training.events import Checkpoint, Dropped, Event, ResumePoint, RunState, SliceDone, StepDone
from softprompt.training.memory import peak_bytes
from softprompt.training.plan import Plan
from softprompt.training.ranks import Alone, Ranks
from softprompt.training.train import Candidate, Data, Prepared, Sink, TrainResult, prepare, train, train_together
from softprompt.training.trial import Score, Trial

__all__ = [
    "Alone",
    "Candidate",
    "Checkpoint",
    "Data",
    "Dropped",
    "Event",
    "Plan",
    "Prepared",
    "Ranks",
    "ResumePoint",
    "RunState",
    "Score",
    "Sink",
    "SliceDone",
    "StepDone",
    "TrainResult",
    "Trial",
    "peak_bytes",
    "prepare",
    "train",
    "train_together",
]
