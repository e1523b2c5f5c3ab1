"""References as files: what networks said of real pictures, to be read in place of the pictures.

Three kinds. Files of scripts/make_reference.py carry everything their numbers depend on and are compared field by field.
npz files of published statistics (`mu`, `sigma`, in ADM's also `mu_s`, `sigma_s` and 10,000 pictures `arr_0`) do not say
which network made them: the protocol that accepts them says so, and the record of a score says that it was taken to be.
A cache holds files of the first kind under the checksum of the pictures' pixels and the network, never under a name.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eval.features import FeatureError, FeatureNetwork, NetworkRecord
from eval.files import sha256_of, write_file
from eval.frechet import Gaussian
from eval.look import Gathered, Seen, Want
from eval.pictures import UNREADABLE, PictureError
from eval.protocol import Protocol
from eval.provenance import NOT_RECORDED, Computation, Origin, PicturesRecord, library_versions

KEY, VERSION = "arloom.reference", 1


def save_reference(
    path: str | Path, seen: Seen, protocols: Iterable[str] = (), audit: Mapping[str, Any] | None = None
) -> None:
    """A safetensors file of what was gathered, written atomically, the rest of it as JSON in its header.

    protocols: the names it was made for. audit: of the pictures, as `Audit.record` gives it.
    """
    tensors, entries = {}, []
    for number, (want, each) in enumerate(seen.items()):
        for name, tensor in _tensors(each.value).items():
            tensors[f"{number}.{name}"] = tensor.detach().cpu().contiguous()
        entries.append({"want": _key(want), **{name: asdict(part) for name, part in _records(each).items()}})
    header = {"version": VERSION, "protocols": list(protocols), "entries": entries, "audit": audit}
    write_file(path, lambda draft: save_file(tensors, draft, {KEY: json.dumps(header)}))


def read_reference(path: str | Path, wants: Iterable[Want], networks: Mapping[str, FeatureNetwork]) -> Seen:
    """What a file holds of `wants`. Raises PictureError for a file that is damaged, of another kind, or lacks one of
    them, FeatureError where it was made by another network or preprocessing; either names both sides and the cure."""
    path = Path(path)
    seen: dict[Want, Gathered] = {}
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "{}"))
            if header.get("version") != VERSION:
                raise PictureError(f"{path}: no reference file of this version; {_cure(path)}")
            held = {entry["want"]: number for number, entry in enumerate(header["entries"])}
            for want in wants:
                if _key(want) not in held:
                    made_for = ", ".join(header["protocols"]) or "nothing that is named"
                    raise PictureError(
                        f"{path}: was made for {made_for} and holds {'; '.join(held)}, "
                        f"this protocol needs {_key(want)}; {_cure(path)}"
                    )
                number = held[_key(want)]
                entry = header["entries"][number]
                made_by, wanted = NetworkRecord(**entry["network"]), networks[want.network].record
                if made_by != wanted:
                    pairs = zip(vars(made_by).items(), vars(wanted).values(), strict=True)
                    differ = "; ".join(f"{field}: {ours} / {now}" for (field, ours), now in pairs if ours != now)
                    raise FeatureError(
                        f"{path}: was made by another network than the samples are seen by ({differ}); {_cure(path)}"
                    )
                names = [name for name in file.keys() if name.startswith(f"{number}.")]  # noqa: SIM118 (no mapping)
                value = _value({name.partition(".")[2]: file.get_tensor(name) for name in names})
                pictures = PicturesRecord(**entry["pictures"] | {"origin": Origin(**entry["pictures"]["origin"])})
                seen[want] = Gathered(value, made_by, pictures, Computation(**entry["computation"]))
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise PictureError(f"{path}: not a whole reference file ({error}); {_cure(path)}") from error
    return seen


def published_statistics(
    path: str | Path, protocol: Protocol, networks: Mapping[str, FeatureNetwork]
) -> dict[Want, Gathered]:
    """Gaussians of an npz of published statistics, for the gatherings that `protocol.arrays` names. {} for other npz.

    Raises PictureError where it has statistics and the protocol takes none, where arrays are missing, of another shape
    or not finite; FeatureError where the network is not the published one, which made the statistics.
    """
    path = Path(path)
    names = npz_names(path)
    if "mu" not in names:
        return {}
    if not protocol.arrays:
        raise PictureError(
            f"{path}: holds the statistics (mu, sigma) of a feature network that it does not name, and protocol "
            f"{protocol.name} compares with pictures; give these, or choose a protocol that takes statistics"
        )
    found, sha256 = {}, sha256_of(path)
    wanted = {Want(m.network, g): g for m in protocol.metrics for g in m.of_reference if g in protocol.arrays}
    for want, gathering in wanted.items():
        network = networks[want.network]
        if not network.record.comparable_to_papers:
            raise FeatureError(
                f"{path}: its statistics are of the published network, the samples are seen by {network.record.name}; "
                "give the published weights, or pictures as the reference"
            )
        arrays = {name: _array(path, names, name, protocol) for name in protocol.arrays[gathering]}
        mean, cov = arrays.values()
        if mean.shape != (len(mean),) or cov.shape != (len(mean), len(mean)):
            shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise PictureError(f"{path}: {shapes}; a mean (d,) and a covariance (d, d) are needed")
        if gathering.output == network.record.layer and len(mean) != network.record.dim:
            raise PictureError(
                f"{path}: is of {len(mean)} features, {network.record.name} has {network.record.dim}: "
                "the statistics of another network; give those of this protocol"
            )
        assumed = {"network": f"not named in the file; taken to be {want.network}, by the protocol"}
        origin = Origin.of_data(NOT_RECORDED, assumed)
        record = PicturesRecord(str(path), sha256, *[NOT_RECORDED] * 3, origin, NOT_RECORDED)
        value = Gaussian(*(torch.from_numpy(array.astype(np.float64)) for array in (mean, cov)))
        computation = Computation(NOT_RECORDED, str(mean.dtype), 0, library_versions())
        found[want] = Gathered(value, network.record, record, computation)
    return found


def npz_names(path: Path) -> set[str]:
    """The arrays of an npz. Raises PictureError for a file that is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except UNREADABLE as error:
        raise PictureError(f"{path}: not a whole npz file ({error}); copy or make it again") from error


@dataclass(frozen=True)
class StatisticsCache:
    """A folder of reference files, one for each gathering of each set that a network has seen."""

    folder: Path

    def known(self, sha256: str, wants: Iterable[Want], networks: Mapping[str, FeatureNetwork]) -> dict[Want, Gathered]:
        """What is held of the set with this checksum."""
        paths = {want: self._path(sha256, want, networks[want.network].record) for want in wants}
        return {want: read_reference(path, [want], networks)[want] for want, path in paths.items() if path.is_file()}

    def keep(self, seen: Seen) -> None:
        """Put in what is not held yet."""
        for want, each in seen.items():
            path = self._path(each.pictures.sha256, want, each.network)
            if not path.is_file():
                save_reference(path, {want: each})

    def _path(self, sha256: str, want: Want, network: NetworkRecord) -> Path:
        whole = json.dumps([VERSION, sha256, _key(want), asdict(network)])
        return self.folder / f"{hashlib.sha256(whole.encode()).hexdigest()}.safetensors"


def _key(want: Want) -> str:
    return f"{want.network} {want.gathering}"


def _records(each: Gathered) -> dict[str, Any]:
    return {"network": each.network, "pictures": each.pictures, "computation": each.computation}


def _tensors(value: Any) -> dict[str, Tensor]:
    """A Gaussian, a tensor or a number, taken apart."""
    if isinstance(value, Gaussian):
        rows = {} if value.rows is None else {"factor": value.rows}
        return {"mean": value.mean, "cov": value.cov, **rows}
    if isinstance(value, Tensor):
        return {"tensor": value}
    return {"number": torch.tensor(value, dtype=torch.float64)}


def _value(tensors: Mapping[str, Tensor]) -> Any:
    if "mean" in tensors:
        return Gaussian(tensors["mean"], tensors["cov"], tensors.get("factor"))
    return tensors["tensor"] if "tensor" in tensors else float(tensors["number"])


def _array(path: Path, names: set[str], name: str, protocol: Protocol) -> np.ndarray:
    if name not in names:
        raise PictureError(
            f"{path}: has no array {name}, which protocol {protocol.name} needs; it holds {', '.join(sorted(names))}"
        )
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except UNREADABLE as error:
        raise PictureError(f"{path}: array {name} cannot be read ({error}); copy or make it again") from error
    if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
        raise PictureError(f"{path}: array {name} must hold finite floats, it is {array.dtype}")
    return array


def _cure(path: Path) -> str:
    return f"make it again by scripts/make_reference.py --protocol NAME --out {path}"
