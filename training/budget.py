"""Training for a given time: as many steps as fit it, so that the schedule ends when the time does.

Times are seconds of processor time of this process: other work on the machine moves them less than the clock's.
"""

import shutil
import time
from pathlib import Path

from training.jobs import generator_job
from training.options import Config


def lasting(config: Config, steps: int) -> Config:
    """The configuration with `steps` steps, of which at most a tenth warm up, and one checkpoint, the last."""
    train = config["train"]
    return {
        **config,
        "train": {**train, "steps": steps, "warmup": min(train["warmup"], steps // 10), "save_every": steps},
    }


def seconds_a_step(config: Config, steps: int, folder: Path) -> float:
    """What a step of the generator's job costs: the difference of a run of `steps` steps and one of a single step, both
    made in `folder`, which is removed. A job is run before, untimed.

    Raises ValueError for less than two steps.
    """
    if steps < 2:
        raise ValueError(f"seconds_a_step: steps is {steps}, must be at least 2")
    took = []
    for count in (1, 1, steps):
        shutil.rmtree(folder, ignore_errors=True)
        start = time.process_time()
        generator_job({**lasting(config, count), "out": str(folder), "resume": False})
        took.append(time.process_time() - start)
    shutil.rmtree(folder)
    return max(took[2] - took[1], 1e-6) / (steps - 1)


def fit_steps(config: Config, seconds: float, folder: Path, steps: int = 41) -> Config:
    """The configuration with as many steps as take `seconds`, by the cost of its first `steps`, tried in `folder`."""
    return lasting(config, max(1, round(seconds / seconds_a_step(config, steps, folder))))
