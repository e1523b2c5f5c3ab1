"""A small convolutional classifier of labelled pictures, trained in well under a minute on two CPU cores.

Where no published feature network is at hand it gives what a class-conditional generator can be judged by: whether
samples are recognised as their class, and a Fréchet distance on its penultimate features. That distance bears its own
name, `frechet_classifier_distance`, and is comparable only between runs that share the classifier's checksum.

Axes: B pictures, D features, K classes.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from eval.features import FeatureError, FeatureNetwork, NetworkRecord, tensors_sha256
from eval.files import write_whole
from eval.pixels import from_uint8

CONFIG = "classifier"  # the entry of a file's header that holds the constructor arguments


class Classifier(nn.Module):
    """Pictures float (B, 3, H, W) in [-1, 1] -> logits (B, K), read from `features`.

    Three stages at half, quarter and eighth resolution, two 3x3 convolutions each, then the mean over places.
    """

    def __init__(self, num_classes: int, width: int = 16, dim: int = 64) -> None:
        super().__init__()
        self.config = {"num_classes": num_classes, "width": width, "dim": dim}
        self.stages = nn.Sequential(
            *_convolution(3, width, stride=2),
            *_convolution(width, width),
            *_convolution(width, 2 * width, stride=2),
            *_convolution(2 * width, 2 * width),
            *_convolution(2 * width, 4 * width, stride=2),
            *_convolution(4 * width, 4 * width),
        )
        self.project = nn.Linear(4 * width, dim)
        self.read_out = nn.Linear(dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations (B, D), none negative."""
        places = self.stages(images)  # (B, 4 width, H / 8, W / 8)
        return F.relu(self.project(places.mean((-2, -1))))

    def forward(self, images: Tensor) -> Tensor:
        return self.read_out(self.features(images))

    @torch.inference_mode()
    def accuracy(self, images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
        """The share of pictures (N, 3, H, W) in [-1, 1] that are assigned to their label, int64 (N,)."""
        device = self.read_out.weight.device
        guesses = torch.cat([self(batch.to(device)).argmax(1).cpu() for batch in images.split(batch_size)])
        return float((guesses == labels.cpu()).double().mean())

    def network(self) -> FeatureNetwork:
        """This classifier, in its present state and place, as the scorer takes it."""
        weight = self.read_out.weight
        record = NetworkRecord(
            name=f"classifier of {self.config['num_classes']} classes trained on the training split",
            layer="penultimate",
            dim=self.config["dim"],
            weights_sha256=tensors_sha256(self.state_dict()),
            preprocessing="no resizing, x / 127.5 - 1",
            distance="frechet_classifier_distance",
            comparable_to_papers=False,
        )

        def extract(pictures: Tensor) -> dict[str, Tensor]:
            features = self.features(from_uint8(pictures))
            return {"penultimate": features, "logits": self.read_out(features)}

        return FeatureNetwork(record, weight.device, weight.dtype, extract)

    def save(self, path: str | Path) -> None:
        """A safetensors file, written atomically, which `load_classifier` reads."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_whole(path, save(state, {CONFIG: json.dumps(self.config)}))


def load_classifier(path: str | Path, device: torch.device | str = "cpu") -> Classifier:
    """In eval mode. Raises FeatureError for a file that is missing, damaged, or holds something else."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if CONFIG not in header:
                raise FeatureError(f"{path}: holds no classifier; give a file that Classifier.save wrote")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        model = Classifier(**json.loads(header[CONFIG]))
        model.load_state_dict(state)
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, FeatureError):
            raise
        raise FeatureError(f"{path}: not a readable classifier file ({error})") from error
    return model.to(device).eval()


def train_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    seed: int = 0,
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    device: torch.device | str = "cpu",
) -> Classifier:
    """A classifier in eval mode: AdamW, one-cycle schedule, label smoothing 0.05, pictures bent anew at every step.

    images float (N, 3, H, W) in [-1, 1]; labels int64 (N,) in [0, num_classes). The same arguments give the same
    weights on one machine, whatever the state of the process's random numbers, which is left alone.
    Raises ValueError for labels that do not fit, and for a loss that is no number.
    """
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"train_classifier: {len(images)} pictures, {len(labels)} labels")
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"train_classifier: labels {int(labels.min())} .. {int(labels.max())} for {num_classes} classes"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier(num_classes).to(device)
    rng = Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    epochs = -(-steps * batch_size // len(images))
    order = torch.cat([torch.randperm(len(images), generator=rng) for _ in range(epochs)])
    for step in trange(steps, desc="classifier", unit="step", disable=None, leave=False):
        rows = order[step * batch_size : (step + 1) * batch_size]
        logits = model(bend(images[rows], rng).to(device))
        loss = F.cross_entropy(logits, labels[rows].to(device), label_smoothing=0.05)
        if not loss.isfinite():
            raise ValueError(f"train_classifier: the loss is {loss.item()} at step {step}; are all pixels finite?")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def bend(images: Tensor, rng: Generator, shift: float = 0.12, turn: float = 0.22, zoom: float = 0.12) -> Tensor:
    """Every picture (B, 3, H, W) moved, turned, scaled and bent a little, each in its own way; the border is continued.

    shift: of half the side, at most. turn: radians, at most. zoom: log of the scale, at most. The bending is a smooth
    field through 4x4 knots of standard deviation 0.06 of half the side.
    """
    across, down, angle, scale = (2 * torch.rand(4, len(images), generator=rng) - 1).unbind()
    cos, sin = (zoom * scale).exp() * (turn * angle).cos(), (zoom * scale).exp() * (turn * angle).sin()
    matrix = torch.stack(
        (torch.stack((cos, -sin, shift * across), -1), torch.stack((sin, cos, shift * down), -1)), 1
    )  # (B, 2, 3)
    knots = 0.06 * torch.randn(len(images), 2, 4, 4, generator=rng)
    field = F.interpolate(knots, size=images.shape[-2:], mode="bicubic", align_corners=True)
    places = F.affine_grid(matrix, list(images.shape), align_corners=False) + field.movedim(1, -1)  # (B, H, W, 2)
    return F.grid_sample(images, places, padding_mode="border", align_corners=False)


def _convolution(before: int, after: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    )
