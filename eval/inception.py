"""FID features: torch-fidelity's InceptionV3 (the TensorFlow graph of 2015-12-05), 2048 averages of its last block.

Source: Heusel et al. 2017 (arXiv:1706.08500); weights and network as in torch-fidelity `inception-v3-compat`. The input
is uint8; the three ways in use to bring it to 299x299 and to scale it are entries of PREPROCESSING.

The features differ from theirs in the order of summation only: every batch norm is part of the convolution before it,
and on a CPU a few pictures at a time go through, channels last, so that they stay in its cache.
"""

import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

from eval.features import FeatureError, FeatureNetwork, NetworkRecord
from eval.files import sha256_of
from eval.resize import resize
from eval.weights import cure, find_weights, is_published, read_state

NETWORK = "inception"
TENSORS, CLASSES = 566, 1008  # of the published file, and of its last layer
LAYER, DIM = "2048", 2048
SIDE = 299
CHUNK = 8  # pictures at a time on a CPU
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
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    preprocessing: str = "tf1",
    allow_download: bool = False,
    strict: bool = False,
) -> FeatureNetwork:
    """The network of FID on `device`, in float32.

    weights: a local file; without it, what eval/weights.py finds. Other weights than the published ones serve as well,
    but their distance is never called FID; strict: they are an error. preprocessing: a key of PREPROCESSING.
    Raises MetricWeightsMissing where there is no file, FeatureError for one that is damaged or of another network, and
    for another preprocessing.
    """
    _input_rule(preprocessing)
    path = find_weights(NETWORK, weights, allow_download)
    sha256 = sha256_of(path)
    published = is_published(NETWORK, path, sha256, strict)
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
        return inception_features(model, pictures, preprocessing)

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
    rule = _input_rule(preprocessing)
    parts = pictures.split(CHUNK) if pictures.device.type == "cpu" else [pictures]
    found = [_features(model, part, *rule) for part in parts]
    return {name: torch.cat([features[name] for features in found]) for name in found[0]}


def _features(
    model: FeatureExtractorInceptionV3, pictures: Tensor, rule: str, centre: float, scale: float
) -> dict[str, Tensor]:
    x = (resize(pictures, (SIDE, SIDE), rule) - centre) / scale
    if x.device.type == "cpu":
        x = x.contiguous(memory_format=torch.channels_last)
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
    """The network, in eval mode, with the tensors of a torch file, a safetensors file or a TorchScript archive.

    Its batch norms are folded into the convolutions, in float64. No code from the file is run. Raises FeatureError for
    a file that is damaged or holds another network.
    """
    state = read_state(path, NETWORK)
    if "fc.weight" not in state or len(state["fc.weight"]) != CLASSES or len(state) != TENSORS:
        classes = len(state["fc.weight"]) if "fc.weight" in state else "no"
        raise FeatureError(
            f"{path}: not the weights of the FID network: {len(state)} tensors and {classes} classes in fc.weight, must "
            f"be {TENSORS} and {CLASSES}. torchvision's inception_v3 has 1000 classes: its distance is not comparable to "
            f"any FID.{cure(NETWORK)}"
        )
    copy = io.BytesIO()  # torch-fidelity loads files with pickle; it gets a copy that we wrote
    torch.save(state, copy)
    copy.seek(0)
    try:
        model = FeatureExtractorInceptionV3("inception-v3-compat", [LAYER], feature_extractor_weights_path=copy)
    except RuntimeError as error:
        raise FeatureError(
            f"{path}: not the weights of the FID network: {str(error)[:300]} …{cure(NETWORK)}"
        ) from error
    for block in [module for module in model.modules() if isinstance(module, BasicConv2d)]:
        block.conv = fuse_conv_bn_eval(block.conv.double(), block.bn.double()).float()
        block.bn = nn.Identity()
    return model


def _input_rule(preprocessing: str) -> tuple[str, float, float]:
    """The resizer, and the grey levels that become 0 and that are one unit."""
    if preprocessing not in PREPROCESSING:
        raise FeatureError(f"inception: unknown preprocessing {preprocessing!r}; known: {', '.join(PREPROCESSING)}")
    return {"tf1": ("tf1", 128, 128), "pytorch": ("torch", 127.5, 127.5), "clean": ("clean", 128, 128)}[preprocessing]
