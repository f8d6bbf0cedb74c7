"""The main job on the embedded base, beside what PEFT's defaults, written templates and a bag of words reach."""

from softprompt.demo.job import Demo, Finding, run_demo
from softprompt.demo.tasks import Task

__all__ = ["Demo", "Finding", "Task", "run_demo"]
