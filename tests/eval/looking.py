"""A small set, three networks of one line, and every kind of gathering; run as a script, one process of several.

python looking.py WORK OUT [PICTURES]: look, and save what was seen; at PICTURES seen, process 0 is killed.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from eval import look as passes
from eval.audit import Audit
from eval.features import FeatureNetwork, NetworkRecord
from eval.frechet import Gaussian
from eval.gather import Gathering, Mean, Moments, Right, Rows, Splits
from eval.look import Seen, Want, look
from eval.pictures import PictureSet, from_tensor
from eval.provenance import Origin

COUNT, BATCH = 100, 7
PICTURES = torch.randint(0, 256, (COUNT, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
GATHERINGS: tuple[Gathering, ...] = (
    Moments("rows"),
    Moments("pixels", "n"),
    Rows("rows"),
    Splits("logits", splits=4, seed=2020),
    Splits("logits", chunk=30, dtype=torch.float32),
    Right(),
    Mean("brightness"),
)
WANTS = [Want("tiny", gathering) for gathering in GATHERINGS]
seen_pictures: list[int] = []


def network(die_at: int | None = None) -> FeatureNetwork:
    """Features of 8 (fewer than pictures) and 192 numbers (more). die_at: kills the process in the middle of a pass."""

    def extract(pictures: Tensor) -> dict[str, Tensor]:
        seen_pictures.append(len(pictures))
        if die_at is not None and sum(seen_pictures) >= die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        grey = pictures.float()
        rows = grey.mean((1, 3))
        return {"rows": rows, "pixels": grey.flatten(1), "logits": rows[:, :5] / 50, "brightness": grey.mean((1, 2, 3))}

    record = NetworkRecord("tiny", "rows", 8, "f" * 64, "none", "fd_tiny", False)
    return FeatureNetwork(record, torch.device("cpu"), torch.float32, extract)


def pictures() -> PictureSet:
    return from_tensor("set", PICTURES, Origin.unknown(), torch.arange(COUNT) % 5)


def seen(work: Path | None, accelerator: Accelerator | None = None, die_at: int | None = None) -> tuple[Seen, Audit]:
    audit = Audit("set", expected=COUNT)
    passes.SAVE_EVERY = 10
    made = look(pictures(), WANTS, {"tiny": network(die_at)}, BATCH, audit=audit, accelerator=accelerator, work=work)
    return made, audit


def numbers(found: Seen, audit: Audit) -> dict[str, Tensor]:
    """All that was seen, as tensors."""
    tensors = {"sha256": torch.tensor(list(bytes.fromhex(audit.sha256()))), "levels": audit.levels}
    for want, each in found.items():
        value = each.value
        if isinstance(value, Gaussian):
            parts = {"mean": value.mean, "cov": value.cov}
        else:
            parts = {"": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)}
        tensors |= {f"{want.gathering} {name}": part.clone() for name, part in parts.items()}
        assert each.pictures.sha256 == audit.sha256() and each.pictures.count == COUNT
    return tensors


if __name__ == "__main__":
    process = Accelerator(cpu=True)
    limit = int(sys.argv[3]) if len(sys.argv) > 3 and process.process_index == 0 else None
    result = numbers(*seen(Path(sys.argv[1]), process, limit))
    torch.save(result, f"{sys.argv[2]}.{process.process_index}")
