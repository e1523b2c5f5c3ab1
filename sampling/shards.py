"""Many samples of one run: planned by index, written in blocks, resumed where they stopped, each image or clip once.

Block b holds the samples [b * size, (b + 1) * size); process r of w makes the blocks r, r + w, ... Every block is a file
of its own, written atomically, so whatever stops the work, the whole blocks count. At the end they become one npz
(`arr_0` uint8 (N, H, W, 3), or (N, T, H, W, 3), `arr_1` int64 (N,)) or a folder of PNG files, of clips MP4 files, without
holding N images in memory.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from layers.checkpoint import write_atomic
from layers.noise import Noise
from sampling.clip_files import write_mp4


class SampleError(ValueError):
    """A sample file or folder that is taken, belongs to other settings, or is damaged."""


def plan_labels(count: int, num_classes: int, plan: str, seed: int) -> Tensor:
    """The class of every sample, int64 (count,): "balanced" repeats 0 .. num_classes - 1, "random" draws from `seed`.

    Raises ValueError for another plan.
    """
    index = torch.arange(count)
    if plan == "balanced":
        return index % num_classes
    if plan == "random":
        u = Noise(seed, index).uniform("label", torch.zeros(1, dtype=torch.int64))[:, 0]
        return (u * num_classes).long()
    raise ValueError(f"class plan is {plan!r}, must be 'balanced' or 'random'")


class Shards:
    """The blocks of `out`: a file NAME.npz, or a folder. settings: whatever the samples depend on, as plain values. fps: of
    clips in a folder.

    Raises SampleError where `out` is finished already, or was begun under other settings (naming them).
    """

    def __init__(self, out: Path, labels: Tensor, block: int, settings: Mapping[str, Any], fps: float = 8) -> None:
        self.fps = fps
        self.out, self.labels, self.block = Path(out), labels, block
        self.parts = self.out.with_name(f".{self.out.name}.parts")
        self.settings = json.loads(json.dumps({**settings, "count": len(labels), "block": block}))
        if self.out.exists():
            raise SampleError(f"{self.out}: exists already; move it away, or choose another --out")
        plan = self.parts / "plan.json"
        if plan.is_file():
            begun = json.loads(plan.read_text())
            changed = [key for key in begun.keys() | self.settings.keys() if begun.get(key) != self.settings.get(key)]
            if changed:
                pairs = ", ".join(f"{key}: {begun.get(key)} -> {self.settings.get(key)}" for key in sorted(changed))
                raise SampleError(
                    f"{self.parts}: begun under other settings ({pairs}); remove it, or choose another --out"
                )

    def begin(self) -> None:
        """Write the plan. Once, before any process makes a block."""
        write_atomic(self.parts / "plan.json", lambda draft: draft.write_text(json.dumps(self.settings)))

    def missing(self, rank: int = 0, world: int = 1) -> Iterator[Tensor]:
        """The sample numbers, int64 (up to `block`,), of every block of this process that is not written yet."""
        for number in range(rank, -(-len(self.labels) // self.block), world):
            if not self._part(number).is_file():
                yield torch.arange(number * self.block, min((number + 1) * self.block, len(self.labels)))

    def write(self, index: Tensor, images: Tensor) -> None:
        """index: one block as `missing` gave it; images uint8 (n, H, W, 3), or clips (n, T, H, W, 3).

        Raises SampleError for clips of odd sides in a folder.
        """
        if images.dim() == 5 and self.out.suffix != ".npz" and (images.shape[2] % 2 or images.shape[3] % 2):
            raise SampleError(
                f"{self.out}: an MP4 has even sides, the clips are {tuple(images.shape[2:4])}; give NAME.npz"
            )
        number = int(index[0]) // self.block
        write_atomic(self._part(number), lambda draft: _save_array(draft, images.cpu().numpy()))

    def finish(self, provenance: Mapping[str, Any]) -> None:
        """Put the blocks together under `out`, the provenance beside it, and remove them. By one process.

        Raises SampleError where a block is missing.
        """
        absent = [int(index[0]) // self.block for index in self.missing()]
        if absent:
            raise SampleError(f"{self.parts}: blocks {absent[:8]} are missing; run the same command again")
        beside = self.out.with_suffix(".json") if self.out.suffix == ".npz" else self.parts / "images" / "samples.json"
        gather = self._to_npz if self.out.suffix == ".npz" else self._to_folder
        gather(lambda: write_atomic(beside, lambda draft: draft.write_text(json.dumps(dict(provenance), indent=1))))
        rmtree(self.parts)

    def _part(self, number: int) -> Path:
        return self.parts / f"{number:06d}.npy"

    def _blocks(self) -> Iterator[np.ndarray]:
        for number in range(-(-len(self.labels) // self.block)):
            yield np.load(self._part(number), mmap_mode="r")

    def _to_npz(self, describe: Callable[[], None]) -> None:
        def write(draft: Path) -> None:
            with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
                shape = (len(self.labels), *next(self._blocks()).shape[1:])
                with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    for block in self._blocks():
                        file.write(np.ascontiguousarray(block).data)
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, self.labels.numpy())

        describe()
        write_atomic(self.out, write)

    def _to_folder(self, describe: Callable[[], None]) -> None:
        images = self.parts / "images"
        images.mkdir(exist_ok=True)
        for number, block in enumerate(self._blocks()):
            for place, image in enumerate(block, number * self.block):
                if image.ndim == 4:
                    write_mp4(images / f"{place:06d}.mp4", torch.tensor(image), self.fps)
                else:
                    Image.fromarray(np.asarray(image)).save(images / f"{place:06d}.png")
        labels = json.dumps(self.labels.tolist())
        write_atomic(images / "labels.json", lambda draft: draft.write_text(labels))
        describe()
        images.replace(self.out)


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)
