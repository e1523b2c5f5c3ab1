"""Tokens in a line beside tokens on a grid: what each number of tokens gives, and what generators make of them.

    python scripts/flexible.py --seconds 120                         # tokenizers, generators, everything; repeat to resume
    python scripts/flexible.py --rows digits_titok_rar --tokenizers runs/digits-vq runs/digits-titok

A row is a generator's configuration in configs/generators, trained and scored as scripts/orders.py does it; missing
tokenizers are trained before. Of every tokenizer: held-out pictures from the first tokens alone, all of which decode or, on a
grid, with its most frequent code for the rest. Of every row whose tokens decode before the last: how often the preview of half
of them is closer to the final picture than that of a quarter. Writes OUT/flexible.md and flexible.png, and JSON with
provenance in OUT/lengths, OUT/previews and OUT/rows.
"""

import io
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orders
import torch
import yaml
from einops import rearrange
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure
from torch import Tensor

from data.loader import evaluation_batches
from data.sets import open_set
from data.token_cache import TokenCache
from eval.files import write_json, write_whole
from eval.pixels import from_uint8, to_uint8
from eval.protocols.classifier import CLASSIFIER
from eval.provenance import Origin
from eval.report import INK, tidy
from layers.checkpoint import read_tensors, save_tensors
from layers.noise import Noise
from layers.spec import Condition, Grid
from sampling.decode import generate
from sampling.preview import any_number
from sampling.sampler import Sampler
from sampling.shards import plan_labels
from tokenizers_vis.protocol import Tokenizer
from training.budget import lasting
from training.jobs import tokenizer_job
from training.options import command_line, parse, tokenizer_parser
from training.run import Run, load_run

BATCH, SHOWN = orders.BATCH, 10
LENGTHS = (1, 2, 4, 8, 16)  # of a tokenizer that decodes any number
ROWS = (
    "digits_next_token",
    "digits_maskgit",
    "digits_rar",
    "digits_titok_next_token",
    "digits_titok_maskgit",
    "digits_titok_rar",
    "digits_flextok_next_token",
)
DISTANCE = "frechet_classifier_distance@{}"
PIECE = 11  # steps of the piece that the cost of a tokenizer's training is measured on


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    made.add_argument("--out", type=Path, default=Path("runs/flexible"), help="Folder to write.")
    made.add_argument(
        "--rows", type=str, nargs="*", default=list(ROWS), help="Names in configs/generators, or YAML files like them."
    )
    made.add_argument(
        "--tokenizers", type=str, nargs="*", default=[], help="Runs of tokenizers beside those of the rows."
    )
    made.add_argument("--seconds", type=float, default=120.0, help="Processor time that a generator is trained for.")
    made.add_argument("--num", type=int, default=1000, help="Samples, and held-out pictures, that are scored.")
    made.add_argument("--seed", type=int, default=0, help="Seed of weights, data order and samples.")
    return made


def flexible(out: Path, rows: Sequence[str], tokenizers: Sequence[str], seconds: float, num: int, seed: int) -> None:
    """Everything that is not there yet, then the table and the plot of all that is."""
    torch.set_num_threads(1)
    files = [str(orders.CONFIGS / "generators" / f"{row}.yaml") if "/" not in row else row for row in rows]
    configs = [orders.parse_row(file, out, seed) for file in files]
    runs = list(dict.fromkeys([*(config["tokenizer_run"] for config in configs), *tokenizers]))
    beside = {**configs[0], "token_cache": ""}
    orders.prepare(
        out,
        [{**beside, "tokenizer_run": run, "token_cache": str(out / "tokens" / Path(run).name)} for run in runs],
        num,
        seed,
    )
    for run in runs:
        made = out / "lengths" / Path(run).name
        if not made.with_suffix(".json").is_file():
            cost = training_seconds(load_run(run), out / "piece")
            found = by_length(out, load_run(run), made.with_suffix(".safetensors"), num)
            write_json(made.with_suffix(".json"), {**found, "training_seconds": cost})
    orders.orders(out, files, seconds, num, seed, 1)
    for file in files:
        made = out / "previews" / f"{Path(file).stem}.json"
        run = load_run(out / "rows" / Path(file).stem / "run")
        if len(run.tokenizer.prefixes) > 1 and not made.is_file():
            write_json(made, previews(run, num, seed))
    write_whole(out / "flexible.md", "".join(f"| {' | '.join(line)} |\n" for line in table(out)).encode())
    save_plot(out)
    print((out / "flexible.md").read_text())
    print(f"{out / 'flexible.md'}, {out / 'flexible.png'}")


# ---- a tokenizer by the number of its tokens


@torch.inference_mode()
def by_length(out: Path, run: Run, drawn: Path, num: int) -> dict[str, Any]:
    """Scores of held-out pictures at every length, as plain values; a few of the pictures go to `drawn`."""
    tokenizer, data = run.tokenizer, run.record["data"]["name"]
    pictures = open_set(data, split="val", size=tokenizer.spec.decoded[1])
    images = torch.cat([batch["image"] for batch in evaluation_batches(pictures, BATCH)])[:num]
    labels = torch.from_numpy(pictures.labels)[:num]
    cache = TokenCache(out / "tokens" / run.path.name, run.tokenizer_sha256)
    filler = None
    if isinstance(tokenizer.spec.layout, Grid) and len(tokenizer.prefixes) == 1:
        filler = int(torch.stack([cache[i]["tokens"] for i in range(len(cache))]).flatten().bincount().argmax())
    tokens = torch.cat([tokenizer.encode(part) for part in images.split(BATCH)])
    spread = torch.linspace(0, len(images) - 1, SHOWN).long()
    shown, found = [images[spread]], {}
    for length in shown_lengths(tokenizer, filler):
        again = torch.cat([first(tokenizer, part, length, filler) for part in tokens.split(BATCH)]).clamp(-1, 1)
        error = (again - images).square().flatten(1).mean(1)
        origin = Origin.of_reconstructions("not yet", run.provenance)
        scores = orders.score(out, data, again, labels, origin, [CLASSIFIER])
        found[length] = {"psnr": float((10 * (4 / error).log10()).mean()), "scores": scores}
        shown.append(again[spread])
    save_tensors(drawn, {"images": to_uint8(torch.stack(shown))})
    return {
        "name": run.path.name,
        "pictures": len(images),
        "filler": filler,
        "parameters": sum(it.numel() for it in tokenizer.parameters()),
        "steps": run.record["step"],
        "source": run.provenance,
        "lengths": found,
    }


def shown_lengths(tokenizer: Tokenizer, filler: int | None) -> list[int]:
    last = tokenizer.prefixes[-1]
    if filler is None and not any_number(tokenizer.prefixes):
        return list(tokenizer.prefixes)
    return [*(length for length in LENGTHS if length < last), last]


def first(tokenizer: Tokenizer, tokens: Tensor, length: int, filler: int | None) -> Tensor:
    """The pictures that the first tokens give, the others left out or, with a filler, all equal to it."""
    if filler is None:
        return tokenizer.decode(tokens[:, :length])
    return tokenizer.decode(torch.where(torch.arange(tokens.shape[1]) < length, tokens, filler))


def training_seconds(run: Run, folder: Path) -> float:
    """What its steps cost in processor time, by a piece of them trained again in `folder`, without what a run writes."""
    config = parse(tokenizer_parser(), ["--config", str(run.path / "config.yaml")])
    took = []
    for steps in (1, 1, PIECE):  # the first one warms up
        shutil.rmtree(folder, ignore_errors=True)
        train = lasting(config, steps)["train"] | {"sample_every": 0, "trackers": []}
        data = {**config["data"], "held_out": 0}
        start = time.process_time()
        tokenizer_job({**config, "data": data, "train": train, "out": str(folder), "resume": False})
        took.append(time.process_time() - start)
    shutil.rmtree(folder)
    return run.record["step"] * (took[2] - took[1]) / (PIECE - 1)


# ---- previews


@torch.inference_mode()
def previews(run: Run, num: int, seed: int) -> dict[str, Any]:
    """Samples as a quarter, a half and all of their tokens show them."""
    tokenizer, generator, sampler = run.tokenizer, run.generator, Sampler.from_values(run.recipe)
    labels, last = plan_labels(num, len(run.classes), "balanced", seed), tokenizer.prefixes[-1]
    parts = [
        max(n for n in tokenizer.prefixes if n <= max(last * share, tokenizer.prefixes[0])) for share in (0.25, 0.5)
    ]
    errors = []
    for index in torch.arange(num).split(BATCH):
        tokens = generate(generator, Condition(label=labels[index]), sampler, Noise(seed, index)).tokens
        final = tokenizer.decode(tokens).clamp(-1, 1)
        some = [tokenizer.decode(tokens[:, :n]).clamp(-1, 1) for n in parts]
        errors.append(torch.stack([(it - final).square().flatten(1).mean(1) for it in some]))
    quarter, half = torch.cat(errors, 1)
    return {
        "name": run.path.parent.name,
        "samples": num,
        "tokens": [*parts, last],
        "half_is_closer": int((half < quarter).sum()) / num,
        "squared_error": [float(quarter.mean()), float(half.mean())],
        "source": run.provenance,
        "seed": seed,
    }


# ---- the table and the plot


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def table(out: Path) -> list[list[str]]:
    """Lines of cells: a row a generator, in the order of ROWS; tokenizers without a generator at the end."""
    found = {it["name"]: it for it in read(out / "lengths")}
    shares = {it["name"]: it for it in read(out / "previews")}
    lines = []
    for path in sorted((out / "rows").glob("*/result.json"), key=lambda path: place(path.parent.name)):
        row = json.loads(path.read_text())
        config = yaml.safe_load((path.parent / "run/config.yaml").read_text())
        name = Path(config["tokenizer_run"]).name
        share = f"{100 * shares[row['name']]['half_is_closer']:.1f}" if row["name"] in shares else ""
        scores = row["scores"]
        lines.append(
            [
                row["generator"],
                *coder_cells(found[name]),
                f"{row['parameters'] / 1e6:.2f}M",
                f"{100 * scores['classifier/label_accuracy']['value']:.1f}",
                f"{scores['classifier/' + DISTANCE.format(row['samples'])]['value']:.3g}",
                f"{1000 * row['seconds_an_image']:.1f}",
                f"{row['training_seconds'] / 60:.1f}",
                share,
            ]
        )
    used = {line[1] for line in lines}
    lines += [["", *coder_cells(it), *[""] * 6] for it in found.values() if it["name"] not in used]
    head = [
        *(
            "generator",
            "tokenizer",
            "tokens",
            "its parameters",
            "PSNR, dB",
            "reconstruction distance",
            "its training, min",
        ),
        *("parameters", "label accuracy, %", "sample distance", "ms an image", "training, min", "half closer, %"),
    ]
    return [head, ["---"] * len(head), *lines]


def place(name: str) -> tuple[int, str]:
    return (ROWS.index(name) if name in ROWS else len(ROWS)), name


def coder_cells(it: Mapping[str, Any]) -> list[str]:
    length, whole = max(((int(n), value) for n, value in it["lengths"].items()), key=lambda pair: pair[0])
    distance = whole["scores"][DISTANCE.format(it["pictures"])]["value"]
    return [
        it["name"],
        str(length),
        f"{it['parameters'] / 1e6:.2f}M",
        f"{whole['psnr']:.1f}",
        f"{distance:.3g}",
        f"{it['training_seconds'] / 60:.1f}",
    ]


def save_plot(out: Path) -> None:
    """Two charts against the number of tokens, and below them a column a picture, a row a length, block by block."""
    found = read(out / "lengths")
    rows = {
        it["name"]: from_uint8(read_tensors(out / "lengths" / f"{it['name']}.safetensors")["images"]) for it in found
    }
    heights = [2.6, *(0.42 * len(rows[it["name"]]) for it in found)]
    figure = Figure(figsize=(7.5, sum(heights) + 0.5), layout="constrained", dpi=130)
    charts, *blocks = figure.subfigures(1 + len(found), 1, height_ratios=heights)
    psnr, distance = charts.subplots(1, 2)
    for it in found:
        lengths = [int(n) for n in it["lengths"]]
        label = it["name"] if it["filler"] is None else f"{it['name']}, the rest its commonest code"
        at = it["lengths"].values()
        psnr.plot(lengths, [value["psnr"] for value in at], marker="o", ms=3.5, label=label)
        key = DISTANCE.format(it["pictures"])
        distance.plot(lengths, [value["scores"][key]["value"] for value in at], marker="o", ms=3.5)
    for axes, title in ((psnr, "PSNR of held-out pictures, dB"), (distance, "Fréchet classifier distance")):
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        axes.set_xlabel("tokens", fontsize=8, color=INK)
        axes.set_xscale("log", base=2)
        axes.set_xticks(LENGTHS, LENGTHS)
        tidy(axes)
    distance.set_yscale("log")
    psnr.legend(fontsize=6.5, frameon=False)
    for block, it in zip(blocks, found, strict=True):
        block.suptitle(it["name"], x=0.01, ha="left", fontsize=9, color=INK)
        axes = block.subplots(1, 1)
        axes.imshow(mosaic(rows[it["name"]]).numpy())
        side = rows[it["name"]].shape[-1]
        names = ["original", *it["lengths"]]
        axes.set_yticks([side * (k + 0.5) for k in range(len(names))], names, fontsize=7, color=INK)
        axes.set_xticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(out / "flexible.png", buffer.getvalue())


def mosaic(pictures: Tensor) -> Tensor:
    """(rows, columns, 3, H, W) in [-1, 1] -> (rows H, columns W, 3) in [0, 1]."""
    return rearrange((pictures.clamp(-1, 1) + 1) / 2, "r n c h w -> (r h) (n w) c")


if __name__ == "__main__":
    command_line(lambda: flexible(**parser().parse_args().as_dict()))
