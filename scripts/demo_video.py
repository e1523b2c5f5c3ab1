"""Clips from nothing: train a video tokenizer and two generators on moving digits, sample, score, show them playing.

    python scripts/demo_video.py --out runs/demo-video       # run it again to resume, or to be told that it is finished

Writes report.html, films (GIF) and filmstrips (PNG) below films/, metrics.json, and two runs, next-token and next-neighbour,
that `scripts/sample.py --run runs/demo-video/next_token` loads.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from jsonargparse import auto_cli
from scipy.stats import ks_2samp
from stages import BATCH, Clock, config, curves, in_batches, scaled, shared
from torch import Tensor
from tqdm import trange

from data.clip_set import ClipSet
from data.sets import open_set
from eval.classifier import Classifier, load_classifier, train_classifier
from eval.codebook import CodebookUsage
from eval.evaluation import Reference, evaluate
from eval.files import write_json
from eval.look import Seen, look
from eval.motion import displacement, unevenness
from eval.networks import open_network
from eval.pictures import PictureSet, from_tensor
from eval.pixels import UINT8_RULES, to_uint8
from eval.protocols import CLIPS
from eval.protocols.classifier import CLASSIFIER
from eval.provenance import Origin, Score
from eval.reconstruction import ReconstructionScorer
from eval.report import Report, score_row
from eval.score import score, wanted_of_samples
from layers.noise import Noise
from layers.packed import pack_linears
from layers.spec import Condition
from sampling.clip_files import save_clips
from sampling.decode import generate
from sampling.sampler import Sampler
from sampling.shards import plan_labels
from training.caching import cache_tokens
from training.jobs import generator_job, tokenizer_job
from training.options import command_line, generator_parser, parse, tokenizer_parser
from training.run import Run, load_run

RULE = UINT8_RULES["trunc_128"]
DATA = "moving_digit"
ORDERS = {"next_token": "generators/moving_digits_larp_ar", "next_neighbour": "generators/moving_digits_larp_nar"}
SHOWN = 8  # clips of a row of the report
LESSONS = 4000  # training videos that the classifier learns from
MOTION = {"displacement": displacement, "unevenness": unevenness}


def demo_video(
    out: Path = Path("runs/demo-video"),
    seed: int = 0,
    share: float = 1.0,
    clips: int = 200,
    fvd_clips: int = 64,
    fvd: tuple[str, ...] = ("common-metrics",),
) -> None:
    """Train, sample and score on moving digits; resumed where it stopped.

    Args:
        out: folder to write
        seed: of weights, data order and samples
        share: of the training steps, for a quick look
        clips: of every set that is scored
        fvd_clips: of these, how many the network of FVD sees; 0: no FVD
        fvd: its protocols, as of scripts/evaluate.py: those that take clips of so few frames
    """
    logging.basicConfig(level=logging.WARNING)
    if (out / "metrics.json").is_file():
        print(f"{out}: finished already, see {out / 'report.html'}; move it away, or choose another --out")
        return
    clock = Clock(out / "timings.json")
    with clock("tokenizer"):
        options = [
            "--config",
            config("tokenizers/moving_digits_larp"),
            *shared(DATA, seed),
            "--out",
            f"{out}/tokenizer",
        ]
        tokenizer_job(scaled(parse(tokenizer_parser(), options), share))
    with clock("tokens"):
        cache_tokens(out / "tokenizer", DATA, out / "tokens", transform="center", batch_size=BATCH)
    for order, recipe in ORDERS.items():
        with clock(order):
            places = [
                "--out",
                f"{out}/{order}",
                "--tokenizer_run",
                f"{out}/tokenizer",
                "--token_cache",
                f"{out}/tokens",
            ]
            options = ["--config", config(recipe), *shared(DATA, seed), *places]
            generator_job(scaled(parse(generator_parser(), options), share))
    runs = {order: load_run(out / order) for order in ORDERS}
    tokenizer = load_run(out / "tokenizer")
    frames, size = tokenizer.tokenizer.spec.decoded[:2]
    with clock("classifier"):
        classifier = frame_classifier(out / "classifier.safetensors", tokenizer, seed, share)
    with clock("sets"):
        held_out = open_set(DATA, split="val", frames=frames, size=size)
        real, other = (Clips.of_data(held_out, start, clips) for start in (0, clips))
        sets = {"real": real, "other real": other, "reconstructions": reconstructed(tokenizer, real)}
    made, effort = {}, {}
    for order, run in runs.items():
        with clock(f"samples {order}"):
            made[order], effort[order] = sampled(run, order, clips, seed)
    sets |= made
    with clock("scores"):
        scores = {**rebuilt_scores(tokenizer, real, sets["reconstructions"]), **frame_scores(classifier, sets)}
        motion = motion_tests(sets)
    with clock("fvd"):
        scores |= video_scores(sets, fvd_clips, fvd)
    metrics = {
        **{name: one.value for name, one in scores.items()},
        "motion": motion,
        "sampling": effort,
        **clock.cost(),
        "provenance": {name: one.record() for name, one in scores.items()},
    }
    report(out, runs, sets, scores, metrics)
    write_json(out / "metrics.json", metrics)  # last: it says that the demo is finished
    for name, one in scores.items():
        print(f"{name:44s} {one.value:10.4f}")
    for name, tests in motion.items():
        for kind, found in tests.items():
            print(f"{f'{kind} {name}':44s} {found['ks']:10.4f}  p {found['p']:.2g}")
    for order, found in effort.items():
        print(f"{order:44s} {found['rounds']:10d} rounds, {found['seconds_a_clip']:.4f} s a clip")
    peak = metrics["peak_memory_bytes"] / 2**20
    print(f"{out / 'report.html'}: {metrics['compute_seconds']:.0f} s of computing, {peak:.0f} MiB at most")


# ---- sets of clips


@dataclass(frozen=True)
class Clips:
    """Clips float (N, 3, T, H, W) in [-1, 1], of classes int64 (N,)."""

    name: str
    clips: Tensor
    labels: Tensor
    origin: Origin

    @classmethod
    def of_data(cls, data: ClipSet, start: int, count: int) -> "Clips":
        """The windows that evaluation takes, of the videos from `start` on."""
        samples = [data[index] for index in range(start, start + count)]
        clips, labels = (torch.stack([sample[key] for sample in samples]) for key in ("image", "label"))
        record = {**data.describe(), "videos": f"{start} .. {start + count - 1}"}
        return cls(f"{DATA} {record['split']} {record['videos']}", clips, labels, Origin.of_data(RULE, record))

    def frames(self) -> PictureSet:
        """Every frame as a picture of its clip's class."""
        pictures = rearrange(self.clips, "b c t h w -> (b t) c h w")
        labels = self.labels.repeat_interleave(self.clips.shape[2])
        return from_tensor(f"frames of {self.name}", to_uint8(pictures), self.origin, labels)


def reconstructed(run: Run, real: Clips) -> Clips:
    tokenizer = run.tokenizer
    clips = in_batches(lambda index: tokenizer.decode(tokenizer.encode(real.clips[index])), len(real.clips), "coding")
    origin = Origin.of_reconstructions(RULE, run.provenance)
    return Clips(f"reconstructions of {real.name}", clips.clamp(-1, 1), real.labels, origin)


def sampled(run: Run, order: str, count: int, seed: int) -> tuple[Clips, dict[str, Any]]:
    """Clips of all classes, equally many, and what they took."""
    generator, sampler = pack_linears(run.generator), Sampler.from_values(run.recipe)
    labels, rounds = plan_labels(count, len(run.classes), "balanced", seed), set()

    def work(index: Tensor) -> Tensor:
        state = generate(generator, Condition(label=labels[index]), sampler, Noise(seed, index))
        rounds.add(state.nfe)
        return run.tokenizer.decode(state.tokens)

    begin = time.perf_counter()
    clips = in_batches(work, count, order)
    effort = {"rounds": max(rounds), "tokens": generator.spec.length}
    effort["seconds_a_clip"] = (time.perf_counter() - begin) / count
    made_by = {
        "sampler": run.recipe,
        "class_plan": "balanced",
        "seed": seed,
        "quantisation": RULE,
        "source": run.provenance,
    }
    return Clips(order, clips.clamp(-1, 1), labels, Origin.of_samples(made_by)), effort


# ---- scores


def frame_classifier(path: Path, run: Run, seed: int, share: float) -> Classifier:
    """Trained on frames of training videos and of their reconstructions, so that it can read what the tokenizer blurs."""
    if not path.is_file():
        frames, size = run.tokenizer.spec.decoded[:2]
        videos = open_set(DATA, split="train", frames=frames, size=size)
        images, labels = [], []
        for start in trange(0, min(LESSONS, len(videos)), BATCH, desc="classifier's lessons", leave=False):
            real = Clips.of_data(videos, start, min(BATCH, len(videos) - start))
            for clips in (real, reconstructed(run, real)):
                some = rearrange(clips.clips[:, :, 2::5], "b c t h w -> b t c h w")
                images.append(some.flatten(0, 1))
                labels.append(clips.labels.repeat_interleave(some.shape[1]))
        steps = max(1, round(1500 * share))
        classifier = train_classifier(torch.cat(images), torch.cat(labels), len(videos.classes), seed, steps=steps)
        classifier.save(path)
    return load_classifier(path)


def rebuilt_scores(run: Run, real: Clips, again: Clips) -> dict[str, Score]:
    """PSNR and SSIM of frames, use of the codebook, and the PSNR of black frames, which says what these are worth."""
    usage = CodebookUsage(run.tokenizer.spec.vocab_size)
    usage.update(in_batches(lambda index: run.tokenizer.encode(real.clips[index]), len(real.clips), "encoding"))
    found = {}
    for name, clips, counts in (
        ("reconstruction", again.clips, usage),
        ("black", torch.full_like(real.clips, -1), None),
    ):
        scorer = ReconstructionScorer(name, real.name)
        for made, original in zip(clips.split(BATCH), real.clips.split(BATCH), strict=True):
            scorer.update(*(rearrange(part, "b c t h w -> (b t) c h w") for part in (made, original)))
        parts = scorer.scores(run.provenance, real.origin.record, BATCH, "cpu", counts)
        found |= {f"{name}_{one.name}": one for one in parts}
    return found


def frame_scores(classifier: Classifier, sets: Mapping[str, Clips]) -> dict[str, Score]:
    """The share of frames that are recognised as their clip's class, of each set."""
    networks, reference = {"classifier": classifier.network()}, Reference(sets["real"].frames())
    found = {}
    for name, clips in sets.items():
        scores = evaluate([CLASSIFIER], clips.frames(), reference, networks, batch_size=256).scores
        found |= {f"{name}/frame_{one.name}": one for one in scores if one.name.startswith("label_accuracy")}
    return found


def motion_tests(sets: Mapping[str, Clips]) -> dict[str, dict[str, dict[str, float]]]:
    """Whether one number of movement a clip has the same law as in real clips: Kolmogorov and Smirnov's two-sample test."""
    real = {kind: measure(sets["real"].clips) for kind, measure in MOTION.items()}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in [*sets][1:]:
        found[name] = {}
        for kind, measure in MOTION.items():
            values = measure(sets[name].clips)
            test = ks_2samp(values.numpy(), real[kind].numpy())
            found[name][kind] = {
                "ks": float(test.statistic),
                "p": float(test.pvalue),
                "mean": float(values.mean()),
                "real_mean": float(real[kind].mean()),
                "clips": len(values),
            }
    return found


def video_scores(sets: Mapping[str, Clips], count: int, names: Sequence[str]) -> dict[str, Score]:
    """FVD of each set against the real one; between the two real ones it is the floor of these."""
    found: dict[str, Score] = {}
    if not count:
        return found
    protocols = [CLIPS[name] for name in names]
    networks = {name: open_network(name) for protocol in protocols for name in protocol.networks}
    seen: dict[str, Seen] = {}
    for name, clips in sets.items():
        chosen = from_tensor(clips.name, clips.clips[:count], clips.origin, clips.labels[:count])
        seen[name] = look(chosen, wanted_of_samples(protocols, chosen), networks, batch_size=4)
    for name in [*sets][1:]:
        for protocol in protocols:
            scores = score(protocol, seen[name], seen["real"]).scores
            found |= {f"{name}/{protocol.name}/{one.name}": one for one in scores}
    return found


# ---- the report


def report(
    out: Path, runs: Mapping[str, Run], sets: Mapping[str, Clips], scores: Mapping[str, Score], metrics: dict[str, Any]
) -> None:
    first = next(iter(runs.values()))
    spec, grid = first.tokenizer.spec, runs["next_neighbour"].generator.grid
    sizes = {order: run.record["modules"]["generator"]["parameters"] for order, run in runs.items()}
    coder = first.record["modules"]["tokenizer"]["parameters"]
    page = Report(
        f"arloom: {DATA.replace('_', ' ')}",
        f"Clips of {spec.decoded[0]} frames of {spec.decoded[1]} x {spec.decoded[2]} pixels as {spec.length} tokens of "
        f"{spec.vocab_size} codes, by a tokenizer of {coder:,} parameters; generated token by token "
        f"({sizes['next_token']:,} parameters), and in diagonals of a grid of {grid.t} x {grid.h} x {grid.w} tokens "
        f"({sizes['next_neighbour']:,} parameters).",
    )
    films = out / "films"
    films.mkdir(exist_ok=True)
    real, again = sets["real"].clips[:SHOWN], sets["reconstructions"].clips[:SHOWN]
    for order in runs:
        rows, clips, labels = {}, sets[order].clips, sets[order].labels
        for label, name in enumerate(first.classes):
            rows[name] = film(films / f"{order}_{name}.gif", clips[labels == label][:SHOWN])
        page.films(f"{order}, one row a class", rows, _effort(metrics["sampling"][order]))
        strip = torch.cat([clips[labels == label][:1] for label in range(len(first.classes))])
        save_clips(films / f"{order}.png", strip, scale=2)
    page.films(
        "Held-out clips above, their reconstructions below",
        {"": film(films / "reconstructions.gif", torch.cat((real, again)), columns=len(real))},
    )
    save_clips(
        films / "reconstructions.png", rearrange(torch.stack((real, again), 1), "b two c t h w -> (b two) c t h w")
    )
    shown = {"real": real[0], "reconstruction": again[0], **{order: sets[order].clips[0] for order in runs}}
    page.pictures("Frame by frame", {name: clip.movedim(1, 0) for name, clip in shown.items()}, width=48)
    page.table(
        "Scores",
        [{"score": name, **score_row(one)} for name, one in scores.items()],
        "A score of `other real` is what a perfect generator would get with as many clips.",
    )
    page.table(
        "Movement",
        [
            {"clips": name, "what": kind, **{key: found[key] for key in ("mean", "real_mean", "ks", "p")}}
            for name, tests in metrics["motion"].items()
            for kind, found in tests.items()
        ],
        "The centre of brightness, in pixels a frame: displacement, and unevenness, the change of it from frame to frame. One "
        "number a clip; ks and p of the two-sample Kolmogorov-Smirnov test against the real clips.",
    )
    for kind in ("tokenizer", *runs):
        page.curves(f"Training: {kind}", curves(out / kind / "log.jsonl"))
    timings = [{"part": part, "seconds": seconds} for part, seconds in metrics["seconds"].items()]
    page.table("Time", timings, f"{metrics['peak_memory_bytes'] / 2**20:.0f} MiB of memory at most")
    page.save(out / "report.html")


def film(path: Path, clips: Tensor, columns: int | None = None) -> bytes:
    """A GIF in which they play side by side, the last frame held for a moment."""
    held = torch.cat((clips, repeat(clips[:, :, -1], "b c h w -> b c t h w", t=4)), dim=2)
    save_clips(path, held, columns=columns, scale=2)
    return path.read_bytes()


def _effort(effort: Mapping[str, Any]) -> str:
    rounds, seconds = effort["rounds"], effort["seconds_a_clip"]
    return f"{rounds} rounds for {effort['tokens']} tokens, {seconds:.3f} s a clip in batches of {BATCH}"


if __name__ == "__main__":
    command_line(lambda: auto_cli(demo_video, as_positional=False))
