"""FID features: torch-fidelity's InceptionV3 (the TensorFlow graph of 2015-12-05), 2048 averages of its last block.

Source: Heusel et al. 2017 (arXiv:1706.08500); weights and network as in torch-fidelity `inception-v3-compat`. The input
is uint8; it is resized to 299x299 by TensorFlow 1's bilinear rule (no antialiasing) and scaled by (x - 128) / 128.
"""

import io
import logging
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.hub import download_url_to_file, get_dir
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from eval.features import FeatureError, FeatureNetwork, NetworkRecord
from eval.files import sha256_of

log = logging.getLogger(__name__)

FILE = URL_INCEPTION_V3.rsplit("/", 1)[1]
SHA256_PREFIX = FILE.removesuffix(".pth").rsplit("-", 1)[1]
SAME_CONTENT = "pt_inception-2015-12-05-6726825d.pth"  # the name the file has in pytorch-fid's releases
LAYER, DIM = "2048", 2048


def inception_network(weights: str | Path | None = None, device: torch.device | str = "cpu") -> FeatureNetwork:
    """The network of FID on `device`, in float32.

    weights: a local file; without it the published one is taken from torch's download folder, or downloaded into it.
    Other weights than the published ones serve as well, but their distance is never called FID.
    Raises FeatureError for weights that cannot be had, are damaged, or belong to another network.
    """
    path = _published_file() if weights is None else Path(weights)
    if not path.is_file():
        raise FeatureError(f"{path}: no such weights file. {_cure()}")
    sha256 = sha256_of(path)
    published = sha256.startswith(SHA256_PREFIX)
    if not published:
        log.warning("%s: sha256 %s…, the published weights have %s…; not FID", path, sha256[:8], SHA256_PREFIX)
    model = _build(path).to(device)
    record = NetworkRecord(
        name="InceptionV3 2015-12-05 (torch-fidelity)" + ("" if published else " with unpublished weights"),
        layer=LAYER,
        dim=DIM,
        weights_sha256=sha256,
        preprocessing="TensorFlow 1 bilinear to 299x299 without antialiasing, (x - 128) / 128",
        distance="fid" if published else "frechet_unpublished_inception_distance",
        comparable_to_papers=published,
    )

    def extract(pictures: Tensor) -> dict[str, Tensor]:
        return {LAYER: model(pictures)[0]}

    return FeatureNetwork(record, torch.device(device), torch.float32, extract)


def _published_file() -> Path:
    folder = Path(get_dir()) / "checkpoints"
    for name in (FILE, SAME_CONTENT):
        if (folder / name).is_file():
            return folder / name
    log.info("downloading %s to %s (95 MB)", URL_INCEPTION_V3, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        download_url_to_file(URL_INCEPTION_V3, str(folder / FILE), hash_prefix=SHA256_PREFIX)
    except (OSError, RuntimeError) as error:  # no network; or another content than the name says
        raise FeatureError(f"the Inception weights could not be downloaded ({error}). {_cure()}") from error
    return folder / FILE


def _build(path: Path) -> FeatureExtractorInceptionV3:
    """The network with the tensors of a file, which is read without running code from it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError, ValueError) as error:
        raise FeatureError(f"{path}: not a readable file of tensors ({error}). {_cure()}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FeatureError(f"{path}: holds no flat dict of tensors. {_cure()}")
    copy = io.BytesIO()  # torch-fidelity loads files with pickle; it gets a copy that we wrote
    torch.save(state, copy)
    copy.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", [LAYER], feature_extractor_weights_path=copy)
    except RuntimeError as error:
        raise FeatureError(
            f"{path}: not the weights of the FID network (a classifier of 1000 classes, as torchvision has it, gives "
            f"another distance): {str(error)[:300]} … {_cure()}"
        ) from error


def _cure() -> str:
    return (
        f"Get {URL_INCEPTION_V3} (95 MB, sha256 begins with {SHA256_PREFIX}) on a machine with a network, "
        "and name the file with --inception-weights FILE"
    )
