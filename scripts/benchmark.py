"""Measure our half of docs/benchmarks.md: decoding and tokenizing speed at published sizes, with random weights, the
memory of training VAR and MVAR, and the evaluation beside torch-fidelity.

    python scripts/benchmark.py sampling --size b --batch_size 4 --scale 4 --top_k 2000 --threads 2
    python scripts/benchmark.py tokenizer --channels 128 --image_size 256
    python scripts/benchmark.py memory --dim 1024 --depth 4 --batch_size 8
    python scripts/benchmark.py evaluation --weights pt_inception-2015-12-05-6726825d.pth --count 64 --threads 2

Seconds of the wall clock and of processor time, the median of --repeats after a warm-up; and the conditions, as JSON.
"""

import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from math import inf
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from jsonargparse import auto_cli
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset
from torch_fidelity.datasets import ImagesPathDataset
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from eval.activations import SavedActivations
from eval.efficiency import compare, time_runs
from eval.gather import Moments
from eval.inception import LAYER, inception_network
from eval.look import Want, look
from eval.pictures import PictureSet, from_tensor, read_pictures
from eval.provenance import Origin
from eval.weights import find_weights
from generators.next_scale import NextScale
from generators.next_token import NextToken
from layers.noise import Noise
from layers.packed import pack_linears
from layers.pyramid import ScaleReader
from layers.spec import Condition, Grid, Pyramid, TokenSpec
from sampling.decode import generate
from sampling.filters import Filter
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from tokenizers_vis.quantizers import VectorQuantizer
from tokenizers_vis.vq import VQTokenizer
from training.loop import TrainOptions, adamw
from training.options import underscored

SCALES = tuple((side, side) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))  # of VAR at 256 x 256
SIZES = {"b": (12, 768, 12), "l": (24, 1024, 16), "xl": (36, 1280, 20), "xxl": (48, 1536, 24), "3b": (24, 3200, 32)}


def sampling(
    size: str = "b",
    grid: int = 16,
    batch_size: int = 4,
    scale: float = 4.0,
    top_k: int = 2000,
    greedy: bool = False,
    packed: bool = True,
    compile: bool = False,
    dtype: str = "float32",
    threads: int = 1,
    repeats: int = 3,
    device: str = "cpu",
) -> None:
    """Next-token decoding of `batch_size` pictures of grid x grid tokens, without the tokenizer.

    Args:
        size: LlamaGen size: b, l, xl, xxl or 3b.
        packed: weights laid out for few rows (CPU, float32).
        compile: torch.compile the transformer.
    """
    torch.set_num_threads(threads)
    depth, dim, heads = SIZES[size]
    spec = TokenSpec(Grid(1, grid, grid), (1, 16 * grid, 16 * grid), vocab_size=16384)
    model = NextToken(spec, dim, depth, heads, num_classes=1000).eval().to(device, getattr(torch, dtype))
    torch.nn.init.normal_(model.head.readout.weight, std=0.1)
    if packed:
        pack_linears(model)
    if compile:
        model.trunk.compile(dynamic=False)
    condition = Condition(label=torch.arange(batch_size, device=device))
    sampler = Sampler(Filter(top_k=top_k), Guidance(scale=scale), greedy)
    noise = Noise(0, torch.arange(batch_size, device=device))
    marks = []

    def work(batch_size: int) -> None:
        marks.clear()
        generate(model, condition, sampler, noise, preview=lambda state: marks.append(time.perf_counter()))

    timing = time_runs(work, batch_size, device, repeats, warmup=1, seconds=inf)
    half = len(marks) // 2
    quarter = len(marks) // 4
    report(
        {
            "what": f"sampling, next token, size {size}, {grid}x{grid} tokens",
            "batch_size": batch_size,
            "scale": scale,
            "top_k": top_k,
            "greedy": greedy,
            "packed": packed,
            "compile": compile,
            "dtype": dtype,
            "seconds_a_batch": timing.median,
            "processor_seconds_a_batch": statistics.median(timing.processor),
            "images_per_second": timing.images_per_second,
            "tokens_per_second": timing.images_per_second * spec.length,
            "ms_a_token_second_quarter": 1000 * (marks[half] - marks[quarter]) / (half - quarter),
            "ms_a_token_last_quarter": 1000 * (marks[-1] - marks[-1 - quarter]) / quarter,
        },
        threads,
        device,
    )


def tokenizer(
    channels: int = 128,
    image_size: int = 256,
    batch_size: int = 1,
    threads: int = 1,
    repeats: int = 3,
    device: str = "cpu",
) -> None:
    """Encoding and decoding with the LlamaGen VQ-16 network."""
    torch.set_num_threads(threads)
    quantizer = VectorQuantizer(dim=8, vocab_size=16384, normalize=True)
    model = VQTokenizer(image_size, quantizer, channels=channels).eval().to(device)
    images = torch.rand(batch_size, 3, image_size, image_size, device=device) * 2 - 1
    with torch.inference_mode():
        tokens = model.encode(images)
        encode = time_runs(lambda _: model.encode(images), batch_size, device, repeats, warmup=1, seconds=inf)
        decode = time_runs(lambda _: model.decode(tokens), batch_size, device, repeats, warmup=1, seconds=inf)
    report(
        {
            "what": f"VQ-16 tokenizer, {channels} channels, {image_size}x{image_size}",
            "batch_size": batch_size,
            "encode_images_per_second": encode.images_per_second,
            "decode_images_per_second": decode.images_per_second,
        },
        threads,
        device,
    )


def memory(dim: int = 1024, depth: int = 4, batch_size: int = 8, threads: int = 1) -> None:
    """Memory of training VAR and MVAR of one size, 680 tokens of 4096 codes: two steps of every stage, each order in
    a process of its own. The peak is the process's, less what it held before there was a model."""
    figures = {"what": f"training memory, {depth} blocks of width {dim}", "batch_size": batch_size}
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for order in ("var", "mvar"):
            found = pool.submit(training_memory, order, dim, depth, batch_size, threads).result()
            figures |= {f"{order}, {name}": value for name, value in found.items()}
    for name in ("activation_bytes", "peak_bytes"):
        figures[f"{name}, ratio"] = figures[f"mvar, {name}"] / figures[f"var, {name}"]
    report(figures, threads, "cpu")


def training_memory(order: str, dim: int, depth: int, batch_size: int, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    before = psutil.Process().memory_info().rss
    spec = TokenSpec(Pyramid(SCALES), (1, 256, 256), vocab_size=4096)
    how = {"attention": "scale", "window": 7, "windowed_from": 8, "coarse_steps": 8} if order == "mvar" else {}
    model = NextScale(spec, ScaleReader(SCALES, 4096, 32), dim, depth, dim // 64, num_classes=1000, **how).train()
    optimizer = adamw(model, TrainOptions(), model.undecayed)
    tokens, condition = torch.randint(4096, (batch_size, spec.length)), Condition(label=torch.arange(batch_size))
    stages = {str(given): given for given in (model.curriculum(step, 100) for step in range(100))}
    most = 0
    for given in 2 * [*stages.values()]:  # the optimiser's moments are there from the second step on
        with SavedActivations(model) as saved:
            loss, _ = model.loss(tokens, condition, **given)
        most = max(most, saved.bytes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = sum(it.numel() for it in model.parameters() if it.requires_grad)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"parameters": weights, "activation_bytes": most, "peak_bytes": peak - before}


def evaluation(
    weights: str | None = None,
    count: int = 64,
    image_size: int = 256,
    batch_size: int = 32,
    threads: int = 1,
    repeats: int = 5,
) -> None:
    """From pictures to the statistics of FID, from memory and from a folder of PNG, beside torch-fidelity, in turn.

    Args:
        weights: The file of the FID network, for both. Default: the published one, where it is found.
    """
    torch.set_num_threads(threads)
    path = find_weights("inception", weights)
    want, networks = Want("inception/tf1", Moments(LAYER)), {"inception/tf1": inception_network(path)}
    extractor = create_feature_extractor(
        "inception-v3-compat", [LAYER], cuda=False, feature_extractor_weights_path=str(path), verbose=False
    )

    def ours(pictures: Callable[[], PictureSet], _: int) -> None:
        look(pictures(), [want], networks, batch_size)

    def theirs(pictures: Dataset, _: int) -> None:
        in_process = threads == 1  # processor time is that of this process
        found = get_featuresdict_from_dataset(pictures, extractor, batch_size, False, in_process, False)
        fid_features_to_statistics(found[LAYER])

    smooth = F.interpolate(torch.rand(count, 3, 16, 16) * 255, (image_size, image_size), mode="bilinear")
    pictures = (smooth + 8 * torch.randn_like(smooth)).clamp(0, 255).to(torch.uint8)
    figures = {"what": f"statistics of FID, {count} pictures, {image_size}x{image_size}", "batch_size": batch_size}
    with TemporaryDirectory() as folder:
        for number, picture in enumerate(pictures):
            Image.fromarray(picture.movedim(0, -1).numpy()).save(Path(folder) / f"{number:06}.png")
        files = sorted(Path(folder).iterdir())
        sides = {
            "tensors": (partial(from_tensor, "tensors", pictures, Origin.unknown()), Subset(pictures, range(count))),
            "png": (partial(read_pictures, folder), ImagesPathDataset(files)),
        }
        for name, (own, other) in sides.items():
            works = {"arloom": partial(ours, own), "torch-fidelity": partial(theirs, other)}
            found = compare(works, "cpu", "float32", count, runs=repeats, warmup=1, seconds=inf).timings
            clock = {who: timing.processor if threads == 1 else timing.wall for who, timing in found.items()}
            medians = {who: statistics.median(seconds) for who, seconds in clock.items()}
            figures |= {f"{name}, images_per_second, {who}": count / median for who, median in medians.items()}
            figures[f"{name}, ratio"] = medians["torch-fidelity"] / medians["arloom"]
    report({**figures, "clock": "processor" if threads == 1 else "wall"}, threads, "cpu")


def report(figures: dict[str, object], threads: int, device: str) -> None:
    """Figures and conditions, one line of JSON a field."""
    conditions = {
        "device": torch.cuda.get_device_name()
        if device.startswith("cuda")
        else platform.processor() or platform.machine(),
        "threads": threads,
        "cores": psutil.cpu_count(logical=False),
        "load_average": round(psutil.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
    print(json.dumps({**rounded, **conditions}, indent=1))


if __name__ == "__main__":
    auto_cli([sampling, tokenizer, memory, evaluation], as_positional=False, args=underscored())
