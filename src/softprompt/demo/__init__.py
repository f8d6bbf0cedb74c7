"""The main job on the embedded base and on a real one, beside PEFT's defaults and what a person would write instead."""

from softprompt.demo.job import Demo, Finding, run_demo
from softprompt.demo.real import RealDemo, RealTask, run_real_demo
from softprompt.demo.tasks import Task

__all__ = ["Demo", "Finding", "RealDemo", "RealTask", "Task", "run_demo", "run_real_demo"]
