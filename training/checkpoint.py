"""Checkpoints to resume from: folders that are whole or absent, and that a full disk or a kill cannot take away.

`checkpoints/step_00001000/` holds what accelerate saves of models, optimisers, schedules, averages and random states
(safetensors, and torch files that are read under `weights_only=True`), and `manifest.json`: the step, the number of
processes, size and sha256 of every file. It is written as a hidden draft, flushed to the disk, and then renamed.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list

from layers.checkpoint import CheckpointError, checksum
from training.run import byte_count, naming_failure

MANIFEST = "manifest.json"
logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run; the newest `keep_last` stay.

    parts: everything with a `state_dict` that `accelerator` saves (for the size named in an error). Raises ValueError
    for an accelerator whose checkpoints would not be one file a model (sharded FSDP, FSDP 1).
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep_last: int, parts: Iterable[Any]) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}: at least the newest checkpoint must stay")
        if accelerator.distributed_type == DistributedType.FSDP:
            plugin = accelerator.state.fsdp_plugin
            if plugin.fsdp_version != 2 or "FULL" not in str(plugin.state_dict_type):
                raise ValueError(
                    f"FSDP {plugin.fsdp_version} with {plugin.state_dict_type}: checkpoints need FSDP 2 and full state "
                    "dicts; launch with --fsdp_version 2 --fsdp_state_dict_type FULL_STATE_DICT"
                )
        self.folder, self.accelerator, self.keep_last, self.parts = folder, accelerator, keep_last, list(parts)

    def save(self, step: int) -> None:
        """Write the state after `step` optimiser steps. Raises NotWritten; the older checkpoints are as they were."""
        accelerator, target = self.accelerator, self.folder / f"step_{step:08d}"
        draft = self.folder / f".{target.name}.draft"
        last = next(map(str, self._found()), "none yet")
        hint = f"Last good checkpoint: {last}. Make room, or lower train.keep_last, and --resume"
        try:
            with naming_failure(target, lambda: sum(byte_count(part.state_dict()) for part in self.parts), hint):
                if accelerator.is_main_process:
                    for left_over in self.folder.glob(".step_*.draft"):
                        shutil.rmtree(left_over)
                    draft.mkdir(parents=True)
                accelerator.wait_for_everyone()
                accelerator.save_state(str(draft))
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    self._seal(draft, step)
                    shutil.rmtree(target, ignore_errors=True)  # only a damaged one: a whole one was resumed from
                    draft.rename(target)
                    _flush(self.folder)
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(draft, ignore_errors=True)
        if accelerator.is_main_process:
            for old in self._found()[self.keep_last :]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def newest(self) -> Path | None:
        """The newest whole checkpoint; a damaged one is reported and passed over.

        None where none was ever written. Raises CheckpointError where all that are there are damaged.
        """
        faults = []
        for folder in self._found():
            try:
                check_whole(folder)
            except CheckpointError as error:
                logger.warning("passed over: %s", error)
                faults.append(error)
            else:
                return folder
        if faults:
            raise CheckpointError(f"{self.folder}: every checkpoint is damaged; the newest: {faults[0]}")
        return None

    def resume(self) -> int:
        """Load the newest whole checkpoint into everything prepared; the number of steps it had done, 0 without one.

        Raises CheckpointError for one that was made by another number of processes, and for code in a file of it.
        """
        accelerator = self.accelerator
        (folder,) = broadcast_object_list([self.newest() if accelerator.is_main_process else None])
        if folder is None:
            return 0
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["processes"] != accelerator.num_processes:
            raise CheckpointError(
                f"{folder}: was trained by {manifest['processes']} processes, now there are "
                f"{accelerator.num_processes}; launch with --num_processes {manifest['processes']}"
            )
        try:
            accelerator.load_state(str(folder))
        except UnpicklingError as error:
            raise CheckpointError(
                f"{folder}: holds something else than tensors and plain values, refused; delete it ({error})"
            ) from error
        return manifest["step"]

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"), reverse=True)

    def _seal(self, draft: Path, step: int) -> None:
        files = sorted(path for path in draft.rglob("*") if path.is_file())
        listed = {str(path.relative_to(draft)): [path.stat().st_size, checksum(path)] for path in files}
        manifest = {"step": step, "processes": self.accelerator.num_processes, "files": listed}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*files, draft / MANIFEST, draft):
            _flush(path)


def check_whole(folder: Path) -> None:
    """Raises CheckpointError naming the first file that is missing, truncated or changed."""
    try:
        listed = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: missing or damaged ({error}); delete {folder}") from error
    for name, (size, digest) in listed.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else "no"
        if found != size:
            raise CheckpointError(f"{path}: has {found} bytes, the manifest says {size}; delete {folder}")
        if checksum(path) != digest:
            raise CheckpointError(f"{path}: does not have the checksum of the manifest; delete {folder}")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
