"""Ways of decoding faster, on real pictures: train a target and what drafts for it, then compare all samplers.

    python scripts/demo_samplers.py --out runs/demo-samplers       # run it again to resume, or to be told that it is finished

Writes discrete/report.html: a next-token generator, a smaller one and an EAGLE drafter; continuous/report.html: two MARs and
continuous speculation; metrics.json: what came out in short.
"""

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from compare_samplers import main as compare_samplers
from jsonargparse import auto_cli
from stages import BATCH, Clock, config, scaled, shared

from data.loader import evaluation_batches
from data.sets import open_set
from eval.classifier import train_classifier
from eval.files import write_json
from eval.speculation import read_records, summary
from training.caching import cache_tokens
from training.jobs import drafter_job, generator_job, tokenizer_job
from training.options import command_line, drafter_parser, generator_parser, parse, tokenizer_parser
from training.run import load_run

DISCRETE = {"target": "digits_next_token_6x6", "small": "digits_next_token_small"}
CONTINUOUS = {"mar": "digits_mar", "mar-small": "digits_mar_small"}
ROUNDS = 16  # of MAR: a token each, so that there is something to save


def demo_samplers(
    out: Path = Path("runs/demo-samplers"),
    data: str = "digits",
    seed: int = 0,
    share: float = 1.0,
    images: int = 30,
    num: int = 500,
    parts: tuple[Literal["discrete", "continuous"], ...] = ("discrete", "continuous"),
) -> None:
    """Train models and what drafts for them on built-in pictures, then compare samplers; resumed where it stopped.

    Args:
        out: folder to write
        data: digits or emoji32
        seed: of weights, data order and samples
        share: of the training steps, for a quick look
        images: of each method, timed one by one
        num: of each method, for quality
        parts: which comparisons to make
    """
    logging.basicConfig(level=logging.WARNING)
    if (out / "metrics.json").is_file():
        print(f"{out}: finished already, see {out}/*/report.html; move it away, or choose another --out")
        return
    clock = Clock(out / "timings.json")

    def train(part: str, tokenizer: str, models: dict[str, str]) -> None:
        with clock(f"{part} tokenizer"):
            options = [
                "--config",
                config(f"tokenizers/{tokenizer}"),
                *shared(data, seed),
                "--out",
                f"{out}/{part}-tokenizer",
            ]
            tokenizer_job(scaled(parse(tokenizer_parser(), options), share))
            cache_tokens(out / f"{part}-tokenizer", data, out / f"{part}-tokens", transform="center", batch_size=BATCH)
        cached = ["--token_cache", f"{out}/{part}-tokens"]
        for name, recipe in models.items():
            with clock(name):
                places = ["--out", f"{out}/{name}", "--tokenizer_run", f"{out}/{part}-tokenizer", *cached]
                options = ["--config", config(f"generators/{recipe}"), *shared(data, seed), *places]
                generator_job(scaled(parse(generator_parser(), options), share))
        with clock(f"{part} classifier"):
            classify(out / f"{part}-classifier.safetensors", out / f"{part}-tokenizer", data, seed, share)

    def compare(part: str, run: str, *words: str) -> None:
        with clock(f"{part} comparison"):
            given = ["--run", f"{out}/{run}", "--report", f"{out}/{part}", "--seed", str(seed), "--reference", data]
            given += [
                "--classifier",
                f"{out}/{part}-classifier.safetensors",
                "--images",
                str(images),
                "--num",
                str(num),
            ]
            compare_samplers([*given, *words])

    if "discrete" in parts:
        train("discrete", "digits_vq_6x6", DISCRETE)
        with clock("eagle"):
            places = [
                "--out",
                f"{out}/eagle",
                "--target_run",
                f"{out}/target",
                "--token_cache",
                f"{out}/discrete-tokens",
            ]
            options = ["--config", config("drafters/digits_eagle"), *shared(data, seed), *places]
            drafter_job(scaled(parse(drafter_parser(), options), share))
        compare("discrete", "target", "--draft-run", f"{out}/small", "--drafter-run", f"{out}/eagle")
    if "continuous" in parts:
        train("continuous", "digits_kl", CONTINUOUS)
        compare("continuous", "mar", "--draft-run", f"{out}/mar-small", "--sampler.rounds", str(ROUNDS))
    found = {part: in_short(out / part) for part in parts}
    write_json(out / "metrics.json", {**found, **clock.cost()})  # last: it says that the demo is finished
    print(", ".join(str(out / part / "report.html") for part in parts))


def classify(path: Path, tokenizer_run: Path, data: str, seed: int, share: float) -> None:
    """A classifier of the pictures at the tokenizer's size, unless it is there."""
    if path.is_file():
        return
    pictures = open_set(data, split="train", size=load_run(tokenizer_run).tokenizer.spec.decoded[1])
    images = torch.cat([batch["image"] for batch in evaluation_batches(pictures, BATCH)])
    labels = torch.from_numpy(pictures.labels)
    train_classifier(images, labels, len(pictures.classes), seed, steps=max(1, round(1000 * share))).save(path)


def in_short(folder: Path) -> dict[str, Any]:
    """Of every method: calls of the target a picture, how many times fewer than plain decoding, speed by the clock."""
    _, records = read_records(folder / "images.jsonl")
    by_name: dict[str, list[Any]] = {}
    for record in records:
        by_name.setdefault(record.method, []).append(record)
    baseline = by_name["ar"]
    found = {name: summary(rows, baseline) for name, rows in by_name.items()}
    return {
        name: {"calls": one.calls, "fewer_calls": one.fewer_calls, "tau": one.tau, "clock": one.speedup.value}
        for name, one in found.items()
    }


if __name__ == "__main__":
    command_line(lambda: auto_cli(demo_samplers, as_positional=False))
