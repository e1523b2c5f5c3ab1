"""FID features: torch-fidelity's InceptionV3 (the TensorFlow graph of 2015-12-05), 2048 averages of its last block.

Source: Heusel et al. 2017 (arXiv:1706.08500); weights and network as in torch-fidelity `inception-v3-compat`. The input
is uint8; the three ways in use to bring it to 299x299 and to scale it are entries of PREPROCESSING.
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
from eval.resize import resize

log = logging.getLogger(__name__)

FILE = URL_INCEPTION_V3.rsplit("/", 1)[1]
SHA256_PREFIX = FILE.removesuffix(".pth").rsplit("-", 1)[1]
SAME_CONTENT = "pt_inception-2015-12-05-6726825d.pth"  # the name the file has in pytorch-fid's releases
LAYER, DIM = "2048", 2048
SIDE = 299
SPATIAL_CHANNELS = 7  # of the first branch of Mixed_6d, after its ReLU: the features of sFID

PREPROCESSING = {
    "tf1": "TensorFlow 1 bilinear to 299x299 without antialiasing, (x - 128) / 128",  # ADM, torch-fidelity
    "pytorch": "torch bilinear to 299x299 without antialiasing, (x - 127.5) / 127.5",  # pytorch-fid
    "clean": "PIL bicubic in float to 299x299, antialiased, (x - 128) / 128",  # clean-fid
}
STAGES = {  # name of the features -> the layers from the stage before up to them
    "64": ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1"),
    "192": ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    "spatial": ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d"),
    "768": ("Mixed_6e",),
    "2048": ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
}


def inception_network(
    weights: str | Path | None = None, device: torch.device | str = "cpu", preprocessing: str = "tf1"
) -> FeatureNetwork:
    """The network of FID on `device`, in float32.

    weights: a local file; without it the published one is taken from torch's download folder, or downloaded into it.
    Other weights than the published ones serve as well, but their distance is never called FID.
    preprocessing: a key of PREPROCESSING. Raises FeatureError for another one, and for weights that cannot be had, are
    damaged, or belong to another network.
    """
    _input_rule(preprocessing)
    path = _published_file() if weights is None else Path(weights)
    if not path.is_file():
        raise FeatureError(f"{path}: no such weights file. {_cure()}")
    sha256 = sha256_of(path)
    published = sha256.startswith(SHA256_PREFIX)
    if not published:
        log.warning("%s: sha256 %s…, the published weights have %s…; not FID", path, sha256[:8], SHA256_PREFIX)
    model = load_inception(path).to(device)
    record = NetworkRecord(
        name="InceptionV3 2015-12-05 (torch-fidelity)" + ("" if published else " with unpublished weights"),
        layer=LAYER,
        dim=DIM,
        weights_sha256=sha256,
        preprocessing=PREPROCESSING[preprocessing],
        distance="fid" if published else "frechet_unpublished_inception_distance",
        comparable_to_papers=published,
    )

    def extract(pictures: Tensor) -> dict[str, Tensor]:
        return {LAYER: inception_features(model, pictures, preprocessing)[LAYER]}

    return FeatureNetwork(record, torch.device(device), torch.float32, extract)


def inception_features(
    model: FeatureExtractorInceptionV3, pictures: Tensor, preprocessing: str = "tf1"
) -> dict[str, Tensor]:
    """All features of uint8 pictures (B, 3, H, W), float32: one pass, by name.

    "64", "192", "768", "2048": means over places after a stage, as wide as the name says; "logits" (B, 1008), and
    "logits_unbiased" without the bias of the last layer, from which the Inception Score is made; "spatial" (B, 2023):
    7 channels at 17 x 17 places of Mixed_6d, for sFID (Nash et al. 2021, arXiv:2103.03841), channels running fastest.
    Raises FeatureError for another preprocessing than the keys of PREPROCESSING.
    """
    rule, centre, scale = _input_rule(preprocessing)
    x = (resize(pictures, (SIDE, SIDE), rule) - centre) / scale
    features = {}
    for name, layers in STAGES.items():
        for layer in layers:
            x = model.get_submodule(layer)(x)
        spatial = name == "spatial"
        features[name] = x[:, :SPATIAL_CHANNELS].movedim(1, -1).flatten(1) if spatial else x.mean((2, 3))
    features["logits_unbiased"] = features["2048"] @ model.fc.weight.T
    features["logits"] = features["logits_unbiased"] + model.fc.bias
    return features


def load_inception(path: Path) -> FeatureExtractorInceptionV3:
    """The network, in eval mode, with the tensors of a torch file, which is read without running code from it.

    Raises FeatureError for a file that is damaged or holds another network.
    """
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


def _input_rule(preprocessing: str) -> tuple[str, float, float]:
    """The resizer, and the grey levels that become 0 and that are one unit."""
    if preprocessing not in PREPROCESSING:
        raise FeatureError(f"inception: unknown preprocessing {preprocessing!r}; known: {', '.join(PREPROCESSING)}")
    return {"tf1": ("tf1", 128, 128), "pytorch": ("torch", 127.5, 127.5), "clean": ("clean", 128, 128)}[preprocessing]


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


def _cure() -> str:
    return (
        f"Get {URL_INCEPTION_V3} (95 MB, sha256 begins with {SHA256_PREFIX}) on a machine with a network, "
        "and name the file with --inception-weights FILE"
    )
