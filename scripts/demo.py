"""The whole chain on real pictures: train a tokenizer and a generator, sample, score, report.

    python scripts/demo.py --out runs/demo       # run it again to resume, or to be told that it is finished

Writes report.html, grid.png, metrics.json, and a run that `scripts/sample.py --run runs/demo` loads.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from stages import BATCH, Clock, config, curves, in_batches, scaled, shared
from torch import Tensor

from data.loader import evaluation_batches
from data.sets import PictureSet, open_set
from eval.classifier import Classifier, load_classifier, train_classifier
from eval.codebook import CodebookUsage
from eval.evaluation import Reference, evaluate
from eval.files import write_json
from eval.nearest import nearest
from eval.pictures import PictureSet as ScoredSet
from eval.pictures import from_tensor
from eval.pixels import UINT8_RULES, to_uint8
from eval.protocols.classifier import CLASSIFIER
from eval.provenance import Origin, Score
from eval.reconstruction import ReconstructionScorer
from eval.report import Report, save_grid, score_row
from layers.noise import Noise
from layers.packed import pack_linears
from layers.spec import Condition
from sampling.decode import generate
from sampling.sampler import Sampler
from sampling.shards import plan_labels
from training.caching import cache_tokens
from training.jobs import generator_job, tokenizer_job
from training.options import command_line, generator_parser, parse, tokenizer_parser
from training.run import Run, load_run

RULE = UINT8_RULES["trunc_128"]
SHOWN = 8  # pictures of a row of the report
EXPORT = ("config.yaml", "tokenizer.safetensors", "generator.safetensors", "run.json")


def demo(out: Path = Path("runs/demo"), data: str = "digits", seed: int = 0, share: float = 1.0) -> None:
    """Train, sample and score on built-in pictures; resumed where it stopped.

    Args:
        out: folder to write
        data: digits or emoji32
        seed: of weights, data order and samples
        share: of the training steps, for a quick look
    """
    logging.basicConfig(level=logging.WARNING)
    if (out / "metrics.json").is_file():
        print(f"{out}: finished already, see {out / 'report.html'}; move it away, or choose another --out")
        return
    clock = Clock(out / "timings.json")
    with clock("tokenizer"):
        options = [*shared(data, seed), "--out", f"{out}/tokenizer"]
        tokenizer_job(scaled(parse(tokenizer_parser(), ["--config", config("tokenizers/digits_vq"), *options]), share))
    with clock("tokens"):
        cache_tokens(out / "tokenizer", data, out / "tokens", transform="center", batch_size=BATCH)
    with clock("generator"):
        places = ["--out", f"{out}/generator", "--tokenizer_run", f"{out}/tokenizer", "--token_cache", f"{out}/tokens"]
        lesson = ["--config", config("generators/digits_next_token"), *shared(data, seed), *places]
        generator_job(scaled(parse(generator_parser(), lesson), share))
    for name in EXPORT:  # the demo's folder is a run itself
        shutil.copyfile(out / "generator" / name, out / name)
    run = load_run(out)
    train, held_out = (Pictures(open_set(data, split=split)) for split in ("train", "val"))
    with clock("classifier"):
        classifier = trained_classifier(out / "classifier.safetensors", train, seed, share)
    with clock("samples"):
        labels = plan_labels(len(held_out.images), len(run.classes), "balanced", seed)
        made = sampled(run, labels, seed)
    with clock("scores"):
        scores, usage, again = measure(run, classifier, train, held_out, made, labels, seed)
    save_grid(rows_of(made, labels, len(run.classes)), out / "grid.png", columns=SHOWN, scale=2)
    values = {name: score.value for name, score in scores.items()}
    frechet = {name.removeprefix("frechet."): values.pop(name) for name in [*values] if name.startswith("frechet.")}
    metrics = {
        **values,
        "frechet": frechet,
        **clock.cost(),
        "provenance": {name: score.record() for name, score in scores.items()} | {"run": run.provenance},
    }
    report(out, run, train, held_out, made, labels, again, scores, usage, metrics)
    write_json(out / "metrics.json", metrics)  # last: it says that the demo is finished
    for name, value in {**values, **{f"frechet.{name}": value for name, value in frechet.items()}}.items():
        print(f"{name:28s} {value:10.4f}")
    peak = metrics["peak_memory_bytes"] / 2**20
    print(f"{out / 'report.html'}: {metrics['compute_seconds']:.0f} s of computing, {peak:.0f} MiB at most")


# ---- training


class Pictures:
    """A whole data set in memory: images float (N, 3, H, W) in [-1, 1], labels int64 (N,)."""

    def __init__(self, pictures: PictureSet) -> None:
        batches = list(evaluation_batches(pictures, BATCH))
        self.images, self.labels = (torch.cat([batch[key] for batch in batches]) for key in ("image", "label"))
        self.record = pictures.describe()
        self.name = f"{self.record['name']} {self.record['split']}"

    def to_score(self, count: int | None = None) -> ScoredSet:
        """The whole set, or `count` pictures spread over it."""
        step = 1 if count is None else len(self.images) // count
        pictures, labels = to_uint8(self.images[::step][:count]), self.labels[::step][:count]
        return from_tensor(self.name, pictures, Origin.of_data(RULE, self.record), labels)


def trained_classifier(path: Path, train: Pictures, seed: int, share: float) -> Classifier:
    if not path.is_file():
        classes = len(train.record["classes"])
        train_classifier(train.images, train.labels, classes, seed, steps=max(1, round(1000 * share))).save(path)
    return load_classifier(path)


# ---- sampling and scores


def sampled(run: Run, labels: Tensor, seed: int) -> Tensor:
    """One picture a label, float (N, 3, H, W)."""
    generator, sampler = pack_linears(run.generator), Sampler.from_values(run.recipe)

    def work(index: Tensor) -> Tensor:
        state = generate(generator, Condition(label=labels[index]), sampler, Noise(seed, index))
        return run.tokenizer.decode(state.tokens)

    return in_batches(work, len(labels), "sampling")


def measure(
    run: Run, classifier: Classifier, train: Pictures, held_out: Pictures, made: Tensor, labels: Tensor, seed: int
) -> tuple[dict[str, Score], CodebookUsage, Tensor]:
    """The scores by name, the use of the codebook, and the held-out pictures reconstructed."""
    spec, count = run.tokenizer.spec, len(held_out.images)
    tokens = in_batches(lambda index: run.tokenizer.encode(held_out.images[index]), count, "encoding")
    again = in_batches(lambda index: run.tokenizer.decode(tokens[index]), count, "decoding")
    usage = CodebookUsage(spec.vocab_size)
    usage.update(tokens)
    rebuilt = ReconstructionScorer("reconstructions", held_out.name)
    for part, original in zip(again.split(BATCH), held_out.images.split(BATCH), strict=True):
        rebuilt.update(part, original)
    rebuilt_scores = rebuilt.scores(run.provenance, held_out.record, BATCH, "cpu", usage)
    noise = Noise(seed, torch.arange(count)).uniform("token", torch.arange(spec.length))
    uniform = in_batches(lambda index: run.tokenizer.decode((noise[index] * spec.vocab_size).long()), count, "uniform")
    made_by = {
        "sampler": run.recipe,
        "class_plan": "balanced",
        "seed": seed,
        "quantisation": RULE,
        "source": run.provenance,
    }
    nothing = {**made_by, "sampler": {"name": "uniform tokens"}, "class_plan": "none"}
    real = Reference(held_out.to_score())

    def scored(pictures: ScoredSet) -> dict[str, Score]:
        found = evaluate([CLASSIFIER], pictures, real, {"classifier": classifier.network()}, batch_size=BATCH).scores
        return {score.name.partition("@")[0]: score for score in found}

    samples = scored(from_tensor("samples", to_uint8(made), Origin.of_samples(made_by), labels))
    floor = scored(train.to_score(count))
    chance = scored(from_tensor("uniform tokens", to_uint8(uniform), Origin.of_samples(nothing)))
    distance = classifier.network().record.distance
    scores = {
        "classifier_accuracy": samples["classifier_accuracy"],
        "label_accuracy": samples["label_accuracy"],
        **{f"{'' if 'codebook' in score.name else 'reconstruction_'}{score.name}": score for score in rebuilt_scores},
        "frechet.samples": samples[distance],
        "frechet.real_floor": floor[distance],
        "frechet.uniform_tokens": chance[distance],
    }
    return scores, usage, again


# ---- the report


def rows_of(images: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The first pictures of every class, class by class."""
    return torch.cat([images[labels == label][:SHOWN] for label in range(classes)])


def report(
    out: Path,
    run: Run,
    train: Pictures,
    held_out: Pictures,
    made: Tensor,
    labels: Tensor,
    again: Tensor,
    scores: dict[str, Score],
    usage: CodebookUsage,
    metrics: dict[str, Any],
) -> None:
    spec, sizes = run.tokenizer.spec, {name: entry["parameters"] for name, entry in run.record["modules"].items()}
    page = Report(
        f"arloom: {train.record['name']}",
        f"Pictures of {spec.decoded[1]} x {spec.decoded[2]} pixels as {spec.layout.h} x {spec.layout.w} tokens of "
        f"{spec.vocab_size} codes, by a tokenizer of {sizes['tokenizer']:,} parameters; generated token by token by "
        f"{sizes['generator']:,} parameters.",
    )
    page.table(
        "Scores",
        [{"score": name, **score_row(score)} for name, score in scores.items()],
        "The distance of samples reads between its floor, as many real pictures against the held-out ones (the classifier "
        "was trained on these real pictures), and uniform tokens, decoded by the same tokenizer.",
    )
    page.classes(
        "Samples, one row a class",
        rows_of(made, labels, len(run.classes)),
        rows_of(labels, labels, len(run.classes)),
        run.classes,
    )
    spread = slice(None, None, max(1, len(again) // (2 * SHOWN)))
    page.pairs("Held-out pictures and their reconstructions", held_out.images[spread], again[spread].clamp(-1, 1))
    some = made[:: max(1, len(made) // SHOWN) + 1][:SHOWN]
    distance, index = nearest(some, train.images.split(BATCH), 4)
    page.nearest("Samples and their nearest training pictures (Euclidean, pixels)", some, train.images[index], distance)
    for kind in ("tokenizer", "generator"):
        page.curves(f"Training the {kind}", curves(out / kind / "log.jsonl"))
    page.histogram("Use of the codebook on held-out pictures", usage.counts)
    timings = [{"part": part, "seconds": seconds} for part, seconds in metrics["seconds"].items()]
    page.table("Time", timings, f"{metrics['peak_memory_bytes'] / 2**20:.0f} MiB of memory at most")
    page.save(out / "report.html")


if __name__ == "__main__":
    command_line(lambda: auto_cli(demo, as_positional=False))
