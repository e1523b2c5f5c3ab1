"""What to know of a set of pictures before its score is believed: the faults that move a score without any error.

    audit = Audit("samples.npz", expected=50_000, num_classes=1000)
    for pictures, labels in batches:
        audit.update(pictures, labels)
    print("\\n".join(audit.lines()))

One pass; per picture 55 bytes are kept, its checksum among them, from which that of the whole set is made. The outcome
does not depend on batch sizes, nor on how the pictures are divided among processes. Clips (B, 3, T, H, W) are audited as
wholes, and for frames that do not move.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from eval.pictures import PictureError, check_pictures, checksums, content_sha256

NAMED = 10  # how many pictures, pairs or classes a finding and the record name
RARE = 1e-3  # what random draws give with less than this probability, they are not believed to have given
UNLABELLED = -1
ROW = np.dtype(
    [
        ("index", "<i8"),
        ("digest", "V32"),
        ("label", "<i4"),
        ("frames", "<u2"),  # 0: a picture
        ("height", "<u2"),
        ("width", "<u2"),
        ("grey", "?"),
        ("constant", "?"),
        ("still", "?"),
    ],
)


@dataclass(frozen=True)
class Finding:
    """text names numbers, pictures by index and, where level is "warning", what to do."""

    name: str
    level: Literal["note", "warning"]
    text: str


@dataclass(frozen=True)
class ClassBalance:
    """Labels against equally likely classes, 0 .. classes - 1.

    unlabelled: pictures that have no label, while others do. fewest, most: pictures per class. missing: classes without
    any. chi_square: Pearson's statistic on classes - 1 degrees of freedom; p: how probable random draws make one as
    large, an approximation that is rough below 5 pictures per class.
    """

    classes: int
    labelled: int
    unlabelled: int
    fewest: int
    most: int
    missing: tuple[int, ...]
    chi_square: float
    p: float

    @property
    def verdict(self) -> Literal["balanced", "random", "uneven"]:
        """balanced: no two classes differ by more than one picture. uneven: p is below RARE."""
        if self.most - self.fewest <= 1:
            return "balanced"
        return "uneven" if self.p < RARE else "random"


@dataclass(frozen=True)
class Facts:
    """What an audit keeps of a batch. rows of ROW, without index and label; levels int64 (256,)."""

    rows: np.ndarray
    levels: Tensor


def facts(name: str, pictures: Tensor) -> Facts:
    """Of uint8 pictures (B, 3, H, W) or clips (B, 3, T, H, W), on any device. Raises PictureError for anything else."""
    check_pictures(name, pictures)
    rows = np.zeros(len(pictures), ROW)
    *frames, rows["height"], rows["width"] = pictures.shape[2:]
    rows["frames"] = frames[0] if frames else 0
    pictures = pictures.cpu()
    red, green, blue = pictures.unbind(1)
    rows["grey"] = ((red == green) & (green == blue)).flatten(1).all(1).numpy()
    corner = pictures.flatten(2)[:, :, :1]
    rows["constant"] = (pictures.flatten(2) == corner).flatten(1).all(1).numpy()
    if frames:
        rows["still"] = (pictures == pictures[:, :, :1]).flatten(1).all(1).numpy() & (frames[0] > 1)
    rows["digest"] = np.array(checksums(pictures), "V32")
    return Facts(rows, pictures.flatten().bincount(minlength=256))


class Audit:
    """Facts of a set of uint8 pictures or clips, gathered batch by batch. levels int64 (256,): how often each occurs.

    expected: how many pictures the protocol asks for. num_classes: default, the highest label + 1.
    """

    def __init__(self, name: str, expected: int | None = None, num_classes: int | None = None) -> None:
        self.name = name
        self.expected = expected
        self.num_classes = num_classes
        self.levels = torch.zeros(256, dtype=torch.int64)
        self._kept = bytearray()  # of ROW

    def update(self, pictures: Tensor, labels: Tensor | None = None, indices: Tensor | None = None) -> None:
        """pictures uint8 (B, 3, H, W) or clips (B, 3, T, H, W), labels int (B,), indices int (B,): places in the whole set,
        by default counted on.

        One of several processes must give the indices of its pictures. Raises PictureError for anything else, and for a
        label that is none of the classes.
        """
        self.take(facts(self.name, pictures), labels, indices)

    def take(self, found: Facts, labels: Tensor | None = None, indices: Tensor | None = None) -> None:
        """`update`, of facts that were made elsewhere, in another thread, say."""
        rows = found.rows.copy()
        for what, numbers in (("labels", labels), ("indices", indices)):
            if numbers is not None and (numbers.shape != rows.shape or numbers.is_floating_point()):
                raise PictureError(
                    f"{self.name}: {what} must be integers, one for each of {len(rows)} pictures; "
                    f"they are {numbers.dtype} {tuple(numbers.shape)}"
                )
        rows["index"] = np.arange(self.count, self.count + len(rows)) if indices is None else indices.cpu().numpy()
        rows["label"] = UNLABELLED if labels is None else self._classes(labels, rows["index"])
        self.levels += found.levels
        self._kept += rows.tobytes()

    def sums(self) -> dict[str, Tensor]:
        """What it holds, as tensors: levels, and rows uint8 (n, bytes of ROW)."""
        rows = (
            torch.frombuffer(bytearray(self._kept), dtype=torch.uint8)
            if self._kept
            else torch.empty(0, dtype=torch.uint8)
        )
        return {"levels": self.levels, "rows": rows.view(-1, ROW.itemsize)}

    def add(self, sums: dict[str, Tensor]) -> None:
        """Take in what another has seen of the same set."""
        self.levels += sums["levels"]
        self._kept += sums["rows"].numpy().tobytes()

    def checksum(self, index: int) -> bytes:
        """Of one picture, as `eval.pictures.checksums` takes it."""
        rows = self._rows()
        return rows["digest"][np.searchsorted(rows["index"], index)].tobytes()

    def sha256(self) -> str:
        """The checksum of the whole set, as `eval.pictures.content_sha256` takes it."""
        return content_sha256(np.ascontiguousarray(self._rows()["digest"]).tobytes())

    @property
    def count(self) -> int:
        return len(self._kept) // ROW.itemsize

    def duplicates(self) -> list[tuple[int, int]]:
        """(first, later) index of every picture that equals an earlier one in all pixels."""
        rows = self._rows()
        _, first, inverse = np.unique(rows["digest"], return_index=True, return_inverse=True)
        first = first[inverse]
        later = first != np.arange(len(rows))
        return list(zip(rows["index"][first[later]].tolist(), rows["index"][later].tolist(), strict=True))

    def constant(self) -> list[int]:
        """Indices of pictures of one colour."""
        rows = self._rows()
        return rows["index"][rows["constant"]].tolist()

    def grey(self) -> int:
        """How many pictures have three equal channels."""
        return int(self._rows()["grey"].sum())

    def still(self) -> list[int]:
        """Indices of clips whose frames are all equal."""
        rows = self._rows()
        return rows["index"][rows["still"]].tolist()

    def sizes(self) -> dict[tuple[int, ...], int]:
        """(height, width), of clips (frames, height, width) -> how many have it, the most frequent first."""
        rows = self._rows()
        shapes = zip(*(rows[axis].tolist() for axis in ("frames", "height", "width")), strict=True)
        found = Counter(shape if shape[0] else shape[1:] for shape in shapes)
        return dict(sorted(found.items(), key=lambda entry: (-entry[1], entry[0])))

    def value_range(self) -> tuple[int, int]:
        """The lowest and the highest grey level of all pictures. Raises PictureError before the first."""
        if not self.count:
            raise PictureError(f"{self.name}: holds no pictures")
        occurring = self.levels.nonzero().flatten()
        return int(occurring[0]), int(occurring[-1])

    def class_balance(self) -> ClassBalance | None:
        """None without labels."""
        labels = self._rows()["label"]
        known = labels[labels != UNLABELLED]
        if not len(known):
            return None
        counts = np.bincount(known, minlength=self.num_classes or 0)
        mean = len(known) / len(counts)
        chi_square = float(((counts - mean) ** 2 / mean).sum())
        half = torch.tensor([len(counts) - 1, chi_square], dtype=torch.float64) / 2
        p = float(torch.special.gammaincc(*half)) if len(counts) > 1 else 1.0
        missing = tuple(np.flatnonzero(counts == 0).tolist())
        fewest, most = int(counts.min()), int(counts.max())
        unlabelled = len(labels) - len(known)
        return ClassBalance(len(counts), len(known), unlabelled, fewest, most, missing, chi_square, p)

    def findings(self) -> list[Finding]:
        """One for every property, in a fixed order; of an empty set, its count alone."""
        if not self.count:
            return [Finding("count", "warning", "holds no pictures; make or copy them again")]
        return [
            self._of_count(),
            self._of_duplicates(),
            self._of_classes(),
            self._of_range(),
            self._of_constants(),
            self._of_sizes(),
            self._of_grey(),
            *([self._of_motion()] if self._clips else []),
        ]

    def record(self) -> dict[str, Any]:
        """Plain values for JSON. Of pairs, indices and missing classes the first NAMED, beside their number."""
        pairs, constant, balance = self.duplicates(), self.constant(), self.class_balance()
        classes = None
        if balance is not None:
            missing = {"count": len(balance.missing), "first": list(balance.missing[:NAMED])}
            classes = asdict(balance) | {"missing": missing, "verdict": balance.verdict}
        return {
            "name": self.name,
            "count": self.count,
            "expected": self.expected,
            "duplicates": {"count": len(pairs), "first": [list(pair) for pair in pairs[:NAMED]]},
            "classes": classes,
            "range": list(self.value_range()) if self.count else None,
            "levels": int((self.levels > 0).sum()),
            "constant": {"count": len(constant), "first": constant[:NAMED]},
            "sizes": [
                dict(zip(("width", "height", "frames"), reversed(size), strict=False)) | {"count": count}
                for size, count in self.sizes().items()
            ],
            "grey": self.grey(),
            "still": len(self.still()),
            "findings": [asdict(finding) for finding in self.findings()],
        }

    def lines(self) -> list[str]:
        """For the terminal: the name of the set, then a line for every finding."""
        return [f"audit of {self.name}", *(f"    {it.level:8}{it.name}: {it.text}" for it in self.findings())]

    def _classes(self, labels: Tensor, indices: np.ndarray) -> np.ndarray:
        found = labels.cpu().numpy()
        limit = np.iinfo(ROW["label"]).max if self.num_classes is None else self.num_classes
        outside = np.flatnonzero((found < 0) | (found >= limit))
        if len(outside):
            place = outside[0]
            raise PictureError(
                f"{self.name}: picture {indices[place]} has label {found[place]}, classes go from 0 to {limit - 1}"
            )
        return found

    def _rows(self) -> np.ndarray:
        """In the order of their indices, and in one order where an index occurs twice."""
        rows = np.frombuffer(bytes(self._kept), ROW)
        return rows[np.lexsort((rows["label"], rows["digest"], rows["index"]))]

    def _of_count(self) -> Finding:
        if self.expected in (None, self.count):
            told = "" if self.expected is None else ", as the protocol asks"
            return Finding("count", "note", f"{self.count} {self._things}{told}")
        lack = self.expected - self.count
        cure = f"make {lack} more" if lack > 0 else f"leave out the last {-lack}"
        text = f"{self.count} {self._things}, the protocol asks for {self.expected}: scores are not comparable; {cure}"
        return Finding("count", "warning", text)

    def _of_duplicates(self) -> Finding:
        pairs = self.duplicates()
        if not pairs:
            return Finding("duplicates", "note", f"no two {self._things} are equal")
        named = _first([f"{later} = {first}" for first, later in pairs])
        text = (
            f"{len(pairs)} of {self.count} {self._things} equal an earlier one ({named}); "
            "give every process its own seed and share, and drop what a sampler repeats to fill its last batch"
        )
        return Finding("duplicates", "warning", text)

    def _of_classes(self) -> Finding:
        balance = self.class_balance()
        if balance is None:
            return Finding("classes", "note", "no labels, so the balance of classes is not known")
        per_class = balance.labelled / balance.classes
        text = (
            f"{balance.labelled} labels in {balance.classes} classes, {balance.fewest} to {balance.most} per class, "
            f"chi-square {balance.chi_square:.4g}, p = {balance.p:.2g}{' (rough)' if per_class < 5 else ''}: "
        )
        text += {
            "balanced": "balanced",
            "random": "as even as random draws",
            "uneven": "less even than random draws",
        }[balance.verdict]
        cures = []
        if balance.verdict == "uneven":
            cures.append("draw classes again, balanced or at random, or compare with pictures of the same shares")
        if balance.missing:
            text += f"; missing classes: {len(balance.missing)} ({_first(balance.missing)})"
            if balance.classes * (1 - 1 / balance.classes) ** balance.labelled < RARE:
                cures.append("make pictures of the missing classes")
        if balance.unlabelled:
            text += f"; {balance.unlabelled} pictures have no label"
            cures.append("give labels to all pictures or to none")
        return Finding("classes", "warning" if cures else "note", "; ".join((text, *cures)))

    def _of_range(self) -> Finding:
        low, high = self.value_range()
        levels = int((self.levels > 0).sum())
        text = f"grey levels {low} to {high}, {levels} of 256 occur"
        if high <= 2:
            cure = "looks like floats in [0, 1] cast to uint8 without a factor 255; save them again by a stated rule"
        elif levels <= 4:
            cure = "looks like floats in [-1, 1] cast to uint8 as they are (0, 1 and 255); save them by a stated rule"
        elif high - low < 128:
            cure = "suspiciously narrow; see that the decoder's range, [-1, 1] or [0, 1], is the one assumed on saving"
        else:
            return Finding("range", "note", text)
        return Finding("range", "warning", f"{text}: {cure}")

    def _of_constants(self) -> Finding:
        constant = self.constant()
        if not constant:
            return Finding("constant", "note", f"no {self._things.removesuffix('s')} is of one colour")
        text = (
            f"{len(constant)} of {self.count} {self._things} are of one colour ({_first(constant)}); "
            "look at them: NaN in the model, or places in the file that were never written"
        )
        return Finding("constant", "warning", text)

    def _of_sizes(self) -> Finding:
        sizes = self.sizes()
        text = ", ".join(f"{count} of {'x'.join(map(str, size))}" for size, count in list(sizes.items())[:NAMED])
        axes = "frames x height x width" if self._clips else "height x width"
        if len(sizes) == 1:
            return Finding("resolution", "note", f"{text} ({axes})")
        text = f"{len(sizes)} sizes ({axes}): {text}; bring all {self._things} to one size by a stated rule"
        return Finding("resolution", "warning", text)

    def _of_grey(self) -> Finding:
        return Finding("colour", "note", f"{self.grey()} of {self.count} {self._things} are grey, three equal channels")

    def _of_motion(self) -> Finding:
        still = self.still()
        if not still:
            return Finding("motion", "note", "the frames of every clip differ")
        text = f"{len(still)} of {self.count} clips are still, all their frames equal ({_first(still)}); look at them"
        return Finding("motion", "warning", text)

    @property
    def _clips(self) -> bool:
        return any(len(size) == 3 for size in self.sizes())

    @property
    def _things(self) -> str:
        return "clips" if self._clips else "pictures"


def _first(entries: Sequence[object]) -> str:
    return ", ".join(map(str, entries[:NAMED])) + (", ..." if len(entries) > NAMED else "")
