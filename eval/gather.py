"""What is kept of a network's outputs while pictures pass: sums where sums do, rows only where a metric needs them.

A gathering is a value that says what to keep of which output; metrics name the gatherings they read
(`eval.protocol.Metric`), and whatever several of them name is kept once. Its keeper takes batches in. What a keeper
holds are sums: those of several processes, or of an interrupted and a resumed evaluation, are added up.

Axes: n pictures (or clips, or pairs), d features, K classes, S splits.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from eval.frechet import FeatureStatistics, Gaussian
from eval.inception_score import SplitSums, chunks, equal_splits

Sums = dict[str, Tensor]


class Keeper(Protocol):
    """One gathering under way, in one process. width: numbers of an output, d."""

    width: int

    def update(self, output: Tensor, index: Tensor, labels: Tensor | None) -> None:
        """output (B, ...) of pictures in a row; index int64 (B,): their numbers in the whole set; labels int64 (B,)."""

    def sums(self) -> Sums:
        """All it holds but for rows on disk, as tensors that may be added to those of another keeper."""

    def add(self, sums: Sums) -> None:
        """Take in what another has gathered."""

    def result(self) -> Any:
        """What the metric reads, once every picture has passed. Raises ValueError where too few have."""


class Gathering(Protocol):
    """A frozen, hashable value. output: the name of the network's output it is made of."""

    output: str

    def keeper(self, count: int, width: int, device: torch.device, rows: "RowFile") -> Keeper:
        """count: n of the whole set; width: d; rows: where rows may be written."""


@dataclass(frozen=True)
class Moments:
    """Mean and covariance, `eval.frechet.Gaussian`, from float64 sums. divisor: "n - 1", or "n" (StyleGAN-V, LARP).

    Of n <= d pictures the rows are kept, which is no more, and makes the rank-deficient covariance exact.
    """

    output: str
    divisor: Literal["n - 1", "n"] = "n - 1"

    def keeper(self, count: int, width: int, device: torch.device, rows: "RowFile") -> Keeper:
        if count <= width:
            return _FewRows(self.divisor, count, width, rows)
        return _Moments(self.divisor, width, device)


@dataclass(frozen=True)
class Rows:
    """All rows, float32 (n, d) in the order of the pictures, on disk and mapped into memory."""

    output: str

    def keeper(self, count: int, width: int, device: torch.device, rows: "RowFile") -> Keeper:
        return _Rows(count, width, rows)


@dataclass(frozen=True)
class Splits:
    """exp of the mean KL divergence from the mean in every split, float64 (S,): the Inception Score's, from logits.

    Either `chunk` consecutive pictures a split, or `splits` equal ones, shuffled by numpy's RandomState(seed) unless
    seed is None. dtype: of the softmax.
    """

    output: str
    splits: int | None = None
    chunk: int | None = None
    seed: int | None = None
    dtype: torch.dtype = torch.float64

    def of_pictures(self, count: int) -> Tensor:
        """The split of every picture, int64 (n,). Raises ValueError for more splits than pictures."""
        if self.chunk is not None:
            return chunks(count, self.chunk)
        order = None if self.seed is None else np.random.RandomState(self.seed).permutation(count)
        return equal_splits(count, self.splits, None if order is None else torch.from_numpy(order))

    def keeper(self, count: int, width: int, device: torch.device, rows: "RowFile") -> Keeper:
        return _Splits(self.of_pictures(count), width, self.dtype, device)


@dataclass(frozen=True)
class Right:
    """The share of pictures whose largest logit is their label's, a float."""

    output: str = "logits"

    def keeper(self, count: int, width: int, device: torch.device, rows: "RowFile") -> Keeper:
        return _Mean(_is_right)


@dataclass(frozen=True)
class Mean:
    """The mean over pictures of an output of one number a picture, (B,) or (B, 1), a float."""

    output: str

    def keeper(self, count: int, width: int, device: torch.device, rows: "RowFile") -> Keeper:
        return _Mean(lambda output, labels, index: output.flatten())


class RowFile:
    """Rows on disk, which several processes write, each its own. They are written, not mapped, so that they do not count
    as memory while networks are at work."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        self.path = path
        self.dtype = dtype if dtype == torch.float64 else torch.float32

    def write(self, first: int, rows: Tensor) -> None:
        """rows (B, d), as those from number `first` on."""
        content = rows.to("cpu", self.dtype).contiguous().numpy()
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(file, content, first * content.itemsize * content.shape[1])
        finally:
            os.close(file)

    def flush(self) -> None:
        """See to it that what is written outlasts the machine."""
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def read(self, count: int, width: int) -> Tensor:
        """All rows (n, d), mapped into memory."""
        content = np.memmap(self.path, str(self.dtype).removeprefix("torch."), "c", shape=(count, width))
        return torch.from_numpy(content)


class _Moments:
    def __init__(self, divisor: str, width: int, device: torch.device) -> None:
        self.width, self.divisor, self.statistics = width, divisor, FeatureStatistics(width, device)
        self.statistics.rows = None  # sums alone: the order in which processes add up has no part in the result

    def update(self, output: Tensor, index: Tensor, labels: Tensor | None) -> None:
        self.statistics.update(output)

    def sums(self) -> Sums:
        gathered = self.statistics
        return {"count": torch.tensor(gathered.count), "total": gathered.total, "outer": gathered.outer}

    def add(self, sums: Sums) -> None:
        self.statistics.count += int(sums["count"])
        self.statistics.total += sums["total"].to(self.statistics.total)
        self.statistics.outer += sums["outer"].to(self.statistics.outer)

    def result(self) -> Gaussian:
        return self.statistics.gaussian(self.divisor)


class _Rows:
    def __init__(self, count: int, width: int, rows: RowFile) -> None:
        self.count, self.width, self.rows = count, width, rows

    def update(self, output: Tensor, index: Tensor, labels: Tensor | None) -> None:
        if output.ndim != 2 or output.shape[1] != self.width:
            raise ValueError(f"rows of {self.width} features asked for, got {tuple(output.shape)}")
        broken = ~output.isfinite().all(1)
        if broken.any():
            raise ValueError(f"the features of picture {int(index[broken.cpu()][0])} are NaN or infinite")
        self.rows.write(int(index[0]), output)

    def sums(self) -> Sums:
        self.rows.flush()
        return {}

    def add(self, sums: Sums) -> None:
        pass

    def result(self) -> Tensor:
        return self.rows.read(self.count, self.width)


class _FewRows(_Rows):
    def __init__(self, divisor: str, count: int, width: int, rows: RowFile) -> None:
        super().__init__(count, width, rows)
        self.divisor = divisor

    def result(self) -> Gaussian:
        statistics = FeatureStatistics(self.width)
        statistics.update(super().result())
        return statistics.gaussian(self.divisor)


class _Splits:
    def __init__(self, split: Tensor, classes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width, self.split, self.dtype = classes, split, dtype
        self.gathered = SplitSums(int(split.max()) + 1, classes, device)

    def update(self, output: Tensor, index: Tensor, labels: Tensor | None) -> None:
        self.gathered.update(output.to(self.dtype).softmax(1), self.split[index])

    def sums(self) -> Sums:
        return {"count": self.gathered.count, "sure": self.gathered.sure, "total": self.gathered.total}

    def add(self, sums: Sums) -> None:
        for name, tensor in self.sums().items():
            tensor += sums[name].to(tensor)

    def result(self) -> Tensor:
        return self.gathered.scores().cpu()


class _Mean:
    def __init__(self, values: Callable[[Tensor, Tensor | None, Tensor], Tensor]) -> None:
        self.width, self.values = 1, values
        self.count, self.total = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.float64)

    def update(self, output: Tensor, index: Tensor, labels: Tensor | None) -> None:
        self.total += self.values(output, labels, index).double().sum().cpu()
        self.count += len(index)

    def sums(self) -> Sums:
        return {"count": self.count, "total": self.total}

    def add(self, sums: Sums) -> None:
        self.count += sums["count"].to(self.count)
        self.total += sums["total"].to(self.total)

    def result(self) -> float:
        return float(self.total / self.count)


def _is_right(logits: Tensor, labels: Tensor | None, index: Tensor) -> Tensor:
    if labels is None:
        raise ValueError("no labels, so nothing that a network could be right about")
    outside = (labels < 0) | (labels >= logits.shape[1])
    if outside.any():
        place = int(outside.nonzero()[0])
        raise ValueError(
            f"picture {int(index[place])} has label {int(labels[place])}, the network knows {logits.shape[1]} classes"
        )
    return logits.argmax(1) == labels.to(logits.device)
