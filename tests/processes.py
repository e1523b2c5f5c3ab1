"""Scripts as a user runs them: in processes of their own, one or several on the CPU."""

import os
import sys
from pathlib import Path

from tests.goldens import ROOT

ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(script: str | Path, *words: object, processes: int = 1) -> list[str]:
    """What starts scripts/`script`. On a CPU `accelerate launch` starts one process whatever it is told: torchrun's
    launcher starts them all, and accelerate finds them."""
    several = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"] if processes > 1 else []
    )
    return [sys.executable, *several, str(ROOT / "scripts" / script), *map(str, words)]
