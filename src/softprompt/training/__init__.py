"""Train soft prompts on a frozen base. Knows neither the engine, nor the server, nor the disk."""

from softprompt.training.events import Checkpoint, Event, SliceDone, StepDone
from softprompt.training.memory import peak_bytes
from softprompt.training.plan import Plan
from softprompt.training.train import Data, Prepared, Sink, TrainResult, prepare, train

__all__ = [
    "Checkpoint",
    "Data",
    "Event",
    "Plan",
    "Prepared",
    "Sink",
    "SliceDone",
    "StepDone",
    "TrainResult",
    "peak_bytes",
    "prepare",
    "train",
]
