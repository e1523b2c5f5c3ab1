"""The table of orders: generators of about equal size, trained for the same time on the digits, and scored alike.

    python scripts/orders.py --seconds 240                                  # every row; repeat it to resume
    python scripts/orders.py --rows next-token var mvar --jobs 2
    python scripts/orders.py --rows configs/generators/my_order.yaml        # a configuration of your own as a row

A row is trained on cached tokens for --seconds of processor time (one thread), so that the clock of a shared machine has
no say: the cost of a step is measured on a short piece, and the schedule is set to end with the time. Its tokenizer is
trained before, where its run is missing; what that makes of as many training pictures is a line in brackets, about the
least distance an order on its tokens can reach. Writes OUT/orders.md, OUT/orders.png and, in OUT/rows/NAME, result.json
and a run that scripts/sample.py loads.
"""

import json
import logging
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from data.loader import batches, evaluation_batches
from data.sets import open_set
from data.token_cache import TokenCache
from eval.activations import SavedActivations
from eval.classifier import load_classifier, train_classifier
from eval.evaluation import Reference, evaluate
from eval.files import write_json, write_whole
from eval.networks import open_network
from eval.pictures import PictureSet, from_batches
from eval.pixels import from_uint8, to_uint8
from eval.protocol import Protocol
from eval.protocols.classifier import CLASSIFIER
from eval.protocols.standins import RC512
from eval.provenance import Origin
from eval.report import save_grid
from layers.checkpoint import read_tensors, save_tensors
from layers.noise import Noise
from layers.packed import pack_linears
from layers.spec import Condition
from sampling.decode import generate
from sampling.sampler import Sampler
from sampling.shards import plan_labels
from training.budget import fit_steps
from training.caching import cache_tokens
from training.generator_loop import lesson
from training.jobs import generator_job, tokenizer_job
from training.options import Config, ConfigError, command_line, generator_parser, parse, tokenizer_parser
from training.run import Run, RunError, load_run

CONFIGS = Path(str(files("configs")))
BATCH = 100
SHOWN = 20  # pictures of a row of the grid
MIB = 2**20

WIDTH = ("--generator.init_args.dim", "112")  # 0.93M to 1.00M parameters, as the others have
HEAD, ENTITY = "--generator.init_args.head", "--generator.init_args.entity"
ROWS: dict[str, tuple[str, ...]] = {  # a configuration in configs/generators, and what differs from it
    "next-token": ("digits_next_token",),
    "var": ("digits_var", *WIDTH),
    "mvar": ("digits_mvar", *WIDTH),
    "nar": ("digits_nar",),
    "maskgit": ("digits_maskgit", *WIDTH),
    "mar-diffusion": ("digits_mar",),
    "mar-flow": ("digits_mar_flow",),
    "mar-rectified": (
        *("digits_mar", HEAD),
        "{class_path: RectifiedFlowHead, init_args: {hidden: 96, depth: 2, steps: 25}}",
    ),
    "mar-mixture": ("digits_mar", *WIDTH, HEAD, "{class_path: MixtureHead, init_args: {components: 16}}"),
    "mar-fourier": (
        *("digits_mar", *WIDTH, HEAD),
        "{class_path: FourierDensity, init_args: {frequencies: 8, bound: 8.0, hidden: 64}}",
    ),
    "xar-cell": ("digits_xar", *WIDTH),
    "xar-token": ("digits_xar", *WIDTH, ENTITY, "{class_path: TokenEntity}"),
    "xar-subsample": ("digits_xar", *WIDTH, ENTITY, "{class_path: SubsampleEntity, init_args: {size: 2}}"),
    "xar-scale": ("digits_xar", *WIDTH, ENTITY, "{class_path: ScaleEntity, init_args: {scales: 3}}"),
    "xar-image": (
        *("digits_xar", *WIDTH, ENTITY, "{class_path: ImageEntity}"),
        *("--sampler.guidance", "{scale: 2.0}"),  # in one entity there is nothing to ramp over
    ),
}


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    made.add_argument("--out", type=Path, default=Path("runs/orders"), help="Folder to write.")
    made.add_argument(
        "--rows",
        type=str,
        nargs="+",
        default=list(ROWS),
        help=f"Of {', '.join(ROWS)}; or YAML files in the manner of configs/generators. Default: all.",
    )
    made.add_argument("--seconds", type=float, default=240.0, help="Processor time that a generator is trained for.")
    made.add_argument("--num", type=int, default=1000, help="Samples that are scored, as many of each class.")
    made.add_argument("--seed", type=int, default=0, help="Seed of weights, data order and samples.")
    made.add_argument("--jobs", type=int, default=1, help="Rows at once, each on one thread.")
    return made


def orders(out: Path, rows: Sequence[str], seconds: float, num: int, seed: int, jobs: int) -> None:
    """Train, sample and score every row that is not there yet, then write the table of all that are."""
    configs = {name: parse_row(name, out, seed) for name in rows}
    configs = {Path(name).stem: config for name, config in configs.items()}
    missing = [name for name in configs if not (out / "rows" / name / "result.json").is_file()]
    prepare(out, [configs[name] for name in missing], num, seed)
    failed = {}
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        # a process a row: the peak of its memory is its own
        works = {pool.submit(make_row, out, name, configs[name], seconds, num, seed): name for name in missing}
        for work in tqdm(as_completed(works), total=len(works), desc="rows", unit="row"):
            if (error := work.exception()) is not None:
                failed[works[work]] = error
    write_table(out)
    if failed:
        raise RunError("\n".join(f"{name}: {type(error).__name__}: {error}" for name, error in failed.items()))
    print((out / "orders.md").read_text())
    print(f"{out / 'orders.md'}, {out / 'orders.png'}")


# ---- what rows have in common


def parse_row(name: str, out: Path, seed: int) -> Config:
    """The configuration of a row, without what would take time but the training. Raises ConfigError for no such row."""
    base, *words = ROWS.get(name, (name,))
    path = CONFIGS / "generators" / f"{base}.yaml" if name in ROWS else Path(base)
    if not path.is_file():
        raise ConfigError(f"{name}: no row of the table ({', '.join(ROWS)}), and no YAML file")
    folder = out / "rows" / path.stem if name not in ROWS else out / "rows" / name
    quiet = ["--data.held_out", "0", "--train.sample_every", "0", "--train.trackers", "[]"]
    config = parse(
        generator_parser(), ["--config", str(path), *words, *quiet, "--out", f"{folder}/run", "--seed", str(seed)]
    )
    return {**config, "token_cache": str(out / "tokens" / Path(config["tokenizer_run"]).name)}


def prepare(out: Path, configs: Sequence[Config], num: int, seed: int) -> None:
    """The tokenizers, their tokens, the classifier, and the scores of what the tokenizers give back."""
    torch.set_num_threads(1)
    for config in {config["tokenizer_run"]: config for config in configs}.values():
        path, data = Path(config["tokenizer_run"]), config["data"]["name"]
        if not (path / "tokenizer.safetensors").is_file():
            tokenizer_job(parse(tokenizer_parser(), ["--config", str(tokenizer_config(str(path))), "--resume"]))
        cache_tokens(path, data, Path(config["token_cache"]), transform="center", batch_size=BATCH)
        floor = out / "tokenizers" / f"{path.name}.json"
        if (out / "classifier.safetensors").is_file() and floor.is_file():
            continue
        run = load_run(path)
        pictures = open_set(data, split="train", size=run.tokenizer.spec.decoded[1])
        images = torch.cat([batch["image"] for batch in evaluation_batches(pictures, BATCH)])
        labels = torch.from_numpy(pictures.labels)
        if not (out / "classifier.safetensors").is_file():
            train_classifier(images, labels, len(pictures.classes), seed).save(out / "classifier.safetensors")
        some = slice(None, None, max(1, len(images) // num))
        scores = reconstructions(out, data, run, images[some][:num], labels[some][:num])
        write_json(floor, {"name": f"({path.name})", "samples": num, "scores": scores})


@torch.inference_mode()
def reconstructions(out: Path, data: str, run: Run, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Scores of training pictures as the tokenizer gives them back."""
    again = torch.cat([run.tokenizer.decode(run.tokenizer.encode(part)) for part in images.split(BATCH)])
    return score(out, data, again, labels, Origin.of_reconstructions("not yet", run.provenance))


def tokenizer_config(run: str) -> Path:
    """The file of configs/tokenizers that writes `run`. Raises RunError where none does."""
    for path in sorted((CONFIGS / "tokenizers").glob("*.yaml")):
        if yaml.safe_load(path.read_text())["out"] == run:
            return path
    raise RunError(f"{run}: no such run, and no file in configs/tokenizers writes it; train it first")


# ---- one row, in a process of its own


def make_row(out: Path, name: str, config: Config, seconds: float, num: int, seed: int) -> None:
    torch.set_num_threads(1)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    folder = out / "rows" / name
    if not (folder / "training.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)  # of a training that was interrupted: its time is lost
        write_json(folder / "training.json", train(config, seconds, folder))
    run = load_run(folder / "run")
    parameters = sum(it.numel() for it in run.generator.parameters() if it.requires_grad)
    labels = plan_labels(num, len(run.classes), "balanced", seed)
    start = time.process_time()
    images, passes = sample(run, labels, seed, name)
    cost = (time.process_time() - start) / num
    save_tensors(folder / "samples.safetensors", {"images": to_uint8(images[: SHOWN * len(run.classes)])})
    made = {"sampler": run.recipe, "class_plan": "balanced", "seed": seed, "source": run.provenance}
    scores = score(out, config["data"]["name"], images, labels, Origin.of_samples(made))
    entry = run.record["modules"]["generator"]["record"]["class_path"]
    result = {
        "name": name,
        "generator": entry,
        "parameters": parameters,
        **json.loads((folder / "training.json").read_text()),
        "activation_bytes": activations(config, run),
        "samples": num,
        "forward_passes": passes,
        "seconds_an_image": cost,
        "scores": scores,
    }
    write_json(folder / "result.json", result)


def train(config: Config, seconds: float, folder: Path) -> dict[str, Any]:
    fitted = fit_steps(config, seconds, folder / "piece")
    start = time.process_time()
    generator_job(fitted)
    took = time.process_time() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batch = fitted["data"]["batch_size"]
    return {"steps": fitted["train"]["steps"], "batch_size": batch, "training_seconds": took, "peak_bytes": peak}


@torch.inference_mode()
def sample(run: Run, labels: Tensor, seed: int, name: str) -> tuple[Tensor, int]:
    """Pictures float (N, 3, H, W), and forward passes of the network for a batch of them."""
    generator, sampler = pack_linears(run.generator), Sampler.from_values(run.recipe)
    images = []
    for index in tqdm(torch.arange(len(labels)).split(BATCH), desc=f"{name}: sampling", unit=f"x{BATCH}", leave=False):
        state = generate(generator, Condition(label=labels[index]), sampler, Noise(seed, index))
        images.append(run.tokenizer.decode(state.tokens))
    return torch.cat(images), state.nfe


def score(
    out: Path,
    data: str,
    images: Tensor,
    labels: Tensor,
    origin: Origin,
    protocols: Sequence[Protocol] = (CLASSIFIER, RC512),
) -> dict[str, Any]:
    """Pictures float (N, 3, H, W) of the classes `labels` against the held-out ones."""
    pictures = open_set(data, split="val", size=images.shape[-1])

    def held_out(size: int, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        return evaluation_batches(Subset(pictures, range(start, stop)), size)

    def made(size: int, start: int, stop: int) -> Iterator[Tensor]:
        return iter(images[start:stop].split(size))

    known = torch.from_numpy(pictures.labels)
    real = from_batches(f"{data} val", len(pictures), held_out, pictures.describe(), known)
    networks = {
        "classifier": load_classifier(out / "classifier.safetensors").network(),
        "rc512": open_network("rc512", "cpu", {}),
    }
    samples = PictureSet("samples", len(images), made, origin, labels, floats=True)
    return evaluate(protocols, samples, Reference(real), networks, batch_size=BATCH).record()


def activations(config: Config, run: Run) -> int:
    """Bytes that the largest stage of the training keeps of one forward pass."""
    run = load_run(run.path)  # not packed
    cache = TokenCache(config["token_cache"], run.tokenizer_sha256)
    stream = batches(cache, config["data"]["batch_size"], config["seed"], start_step=0, rank=0, world=1)
    tokens, condition = lesson(next(stream), run.tokenizer, torch.device("cpu"))
    generator, steps = run.generator.train(), config["train"]["steps"]
    courses = (generator.curriculum(step, steps) for step in range(steps))
    stages = {
        str([v for v in given.values() if not isinstance(v, float)]): given for given in courses
    }  # shares: one stage
    found = []
    for given in stages.values():
        with SavedActivations(generator) as saved:
            generator.loss(tokens, condition, **given)
        found.append(saved.bytes)
    return max(found)


# ---- the table


def write_table(out: Path) -> None:
    """OUT/orders.md and OUT/orders.png of the rows that are finished, in the order of ROWS, then by name."""
    found = [json.loads(path.read_text()) for path in sorted((out / "rows").glob("*/result.json"))]
    if not found:
        return
    found.sort(key=lambda row: [*ROWS].index(row["name"]) if row["name"] in ROWS else len(ROWS))
    floors = [json.loads(path.read_text()) for path in sorted((out / "tokenizers").glob("*.json"))]
    count = found[0]["samples"]
    scores = {
        "label accuracy, %": "classifier/label_accuracy",
        f"Fréchet classifier distance@{count}": f"classifier/frechet_classifier_distance@{count}",
        f"fd_rc512@{count}": f"rc512/fd_rc512@{count}",
    }
    costs = {
        "parameters": lambda row: f"{row['parameters'] / 1e6:.2f}M",
        "steps": lambda row: f"{row['steps']} x {row['batch_size']}",
        "training, s": lambda row: f"{row['training_seconds']:.0f}",
        "forward passes": lambda row: str(row["forward_passes"]),
        "ms an image": lambda row: f"{1000 * row['seconds_an_image']:.1f}",
        "activations, MiB": lambda row: f"{row['activation_bytes'] / MIB:.0f}",
        "peak memory, MiB": lambda row: f"{row['peak_bytes'] / MIB:.0f}",
    }
    head = ["order", *scores, *costs]
    lines = [head, ["---"] * len(head)]
    for row in [*found, *floors]:
        accuracy, *distances = (row["scores"][key]["value"] for key in scores.values())
        spent = [cost(row) if "steps" in row else "" for cost in costs.values()]
        lines.append([row["name"], f"{100 * accuracy:.1f}", *(f"{value:.3g}" for value in distances), *spent])
    write_whole(out / "orders.md", "".join(f"| {' | '.join(line)} |\n" for line in lines).encode())
    pictures = [read_tensors(out / "rows" / row["name"] / "samples.safetensors")["images"][:SHOWN] for row in found]
    save_grid(from_uint8(torch.cat(pictures)), out / "orders.png", columns=SHOWN)


if __name__ == "__main__":
    command_line(lambda: orders(**parser().parse_args().as_dict()))
