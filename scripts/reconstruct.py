"""Score how well a run's tokenizer brings pictures or clips back, and draw originals beside reconstructions.

    python scripts/reconstruct.py --run runs/digits-vq
    python scripts/reconstruct.py --run runs/birds-vq --data folder --root /data/birds --split val
    python scripts/reconstruct.py --run runs/digits-flextok --lengths 1,2,4,8,16        # from the first tokens alone
    python scripts/reconstruct.py --run runs/moving-digits-larp --num 200

Writes reconstruction-DATA-SPLIT.json and .png into the folder of the run: PSNR, SSIM, LPIPS where its weights are at hand,
and the use of the codebook; of clips also the Fréchet distance of videos. With --lengths the scores of every length, in files
named reconstruction-DATA-SPLIT-lengths, and a plot of them.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from data.errors import DataError
from data.loader import evaluation_batches
from data.sets import OF_VIDEOS, open_set
from eval.codebook import CodebookUsage
from eval.evaluation import Reference, evaluate
from eval.features import FeatureError, FeatureNetwork
from eval.files import write_json
from eval.i3d import LEAST_FRAMES
from eval.lengths import length_table, save_length_plot
from eval.networks import open_network
from eval.pictures import PictureError, PictureSet
from eval.protocols.larp import LARP_RECONSTRUCTION
from eval.provenance import Origin, Score
from eval.reconstruction import ReconstructionScorer, reconstructed
from eval.report import save_grid
from eval.weights import MetricWeightsMissing, given_weights
from layers.checkpoint import CheckpointError
from layers.keymap import CheckpointMismatch
from sampling.clip_files import save_clips
from sampling.preview import check_lengths
from training.run import Run, RunError, load_run

CUT = ("window", "stride", "short")  # how a run's own clips were cut from their videos
SHOWN = 64  # pixels that a small picture is enlarged to


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    made.add_argument("--run", type=Path, required=True, help="Run folder of a tokenizer or a generator.")
    made.add_argument("--data", type=str | None, default=None, help="Name of a data set. Default: the run's own.")
    made.add_argument("--split", type=str, default="val", help="train, val or all.")
    made.add_argument("--root", type=str | None, default=None, help="Folder that holds the pictures, if not built in.")
    made.add_argument(
        "--num", type=int | None, default=None, help="How many, spread evenly over the set. Default: all."
    )
    made.add_argument("--lengths", type=str | None, default=None, help="Numbers of first tokens to decode, as 1,2,4.")
    made.add_argument("--pictures", type=int, default=16, help="How many are drawn, spread evenly over the set.")
    made.add_argument("--batch-size", type=int, default=32, help="Pictures the tokenizer sees at once.")
    made.add_argument(
        "--metric-weights", type=str, nargs="+", default=[], help="NAME=FILE of metric networks: lpips-vgg, i3d."
    )
    made.add_argument("--device", type=str | None, default=None, help="Default: the GPU where there is one.")
    made.add_argument("--out", type=Path | None, default=None, help="Folder to write to. Default: the run's.")
    made.add_argument("--overwrite", type=bool, default=False, help="Replace the results of an earlier call.")
    return made


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = load_run(options.run, device)
    tokenizer, spec = run.tokenizer, run.tokenizer.spec
    lengths = tokenizer.prefixes[-1:] if options.lengths is None else asked_lengths(options.lengths, tokenizer.prefixes)
    data, pictures, description = open_pictures(run, options)
    stem = f"reconstruction-{data}-{options.split}" + ("" if options.lengths is None else "-lengths")
    out = (options.out or options.run) / f"{stem}.json"
    if out.exists() and not options.overwrite:
        raise FileExistsError(f"{out}: exists; choose another --out, or --overwrite true")
    left_out: dict[str, str] = {}
    lpips = open_or_say("lpips/vgg", device, options, left_out)
    names = f"reconstructions by {options.run}", f"{data} {options.split}"
    scorers = {n: ReconstructionScorer(*names, lpips=lpips) for n in lengths}
    codebook = None if spec.vocab_size is None or options.lengths is not None else CodebookUsage(spec.vocab_size)
    drawn, first = set(spread(len(pictures), options.pictures)), 0
    shown: list[list[Tensor]] = []
    for batch in tqdm(evaluation_batches(pictures, options.batch_size), desc=data, unit="batch", disable=None):
        images = batch["image"].to(device)
        tokens = tokenizer.encode(images)
        again = [tokenizer.decode(tokens[:, :n]) for n in lengths]
        for n, decoded in zip(lengths, again, strict=True):
            scorers[n].update(decoded, images)
        if codebook is not None:
            codebook.update(tokens)
        shown += [[it[place] for it in (images, *again)] for place in range(len(images)) if first + place in drawn]
        first += len(images)
    told = (run.provenance, description, options.batch_size, device, codebook)
    scores = {n: scorer.scores(*told) for n, scorer in scorers.items()}
    if options.lengths is None:
        distance = clip_distance(run, pictures, names[1], description, options, device, left_out)
        write_scores(out, [*scores[lengths[0]], *distance])
    else:
        write_lengths(out, scores)
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    draw(out.with_suffix(".png"), shown, None if options.lengths is None else ["original", *map(str, lengths)])


def asked_lengths(text: str, prefixes: Sequence[int]) -> tuple[int, ...]:
    """Raises RunError for what are no numbers, or not all decodable."""
    try:
        return check_lengths([int(part) for part in text.split(",")], prefixes)
    except ValueError as error:
        raise RunError(f"--lengths {text}: {error}") from error


def open_pictures(run: Run, options: Namespace) -> tuple[str, Subset, dict[str, Any]]:
    """The name of the set, what is scored of it, and what it says of itself. Clips are cut as the run's own were."""
    own, spec = run.record["data"], run.tokenizer.spec
    own = own.get("pictures", own)  # of a cache of their tokens
    data = options.data or own["name"]
    cut = {}
    if data in OF_VIDEOS:
        cut = {"frames": spec.decoded[0], **({key: own.get(key) for key in CUT} if data == own["name"] else {})}
    elif spec.decoded[0] > 1:
        raise DataError(f"{data}: holds pictures, the tokenizer is one of clips; take one of {', '.join(OF_VIDEOS)}")
    pictures = open_set(data, split=options.split, root=options.root, size=spec.decoded[1], **cut)
    chosen = spread(len(pictures), options.num or len(pictures))
    return data, Subset(pictures, chosen), {**pictures.describe(), "count": len(chosen)}


def spread(count: int, wanted: int) -> list[int]:
    return torch.linspace(0, count - 1, min(wanted, count)).long().tolist()


def open_or_say(name: str, device: str, options: Namespace, left_out: dict[str, str]) -> FeatureNetwork | None:
    """A metric's network; where its weights are not at hand, None, and why."""
    try:
        return open_network(name, device, given_weights(options.metric_weights))
    except MetricWeightsMissing as error:
        left_out[name] = str(error).partition(";")[0]
        return None


def clip_distance(
    run: Run,
    pictures: Subset,
    name: str,
    description: dict[str, Any],
    options: Namespace,
    device: str,
    left_out: dict[str, str],
) -> Sequence[Score]:
    """Of clips the Fréchet distance of videos, by the harness: LARP's protocol for reconstructions on these clips."""
    frames, protocol = run.tokenizer.spec.decoded[0], LARP_RECONSTRUCTION
    (network_name,) = protocol.networks
    if frames == 1:
        return []
    if frames < LEAST_FRAMES or len(pictures) < 2:
        left_out[network_name] = f"{len(pictures)} clips of {frames} frames: it takes 2 of at least {LEAST_FRAMES}"
        return []
    network = open_or_say(network_name, device, options, left_out)
    if network is None:
        return []
    if frames != protocol.made.length:
        protocol = replace(protocol, name=f"{protocol.name}-{frames}f", reference="the originals")

    def read(size: int, start: int, stop: int) -> Iterator[Tensor]:
        return (batch["image"] for batch in evaluation_batches(Subset(pictures, range(start, stop)), size))

    @torch.inference_mode()
    def again(images: Tensor) -> Tensor:
        return run.tokenizer.decode(run.tokenizer.encode(images.to(device)))

    originals = PictureSet(name, len(pictures), read, Origin.of_data("none", description), floats=True)
    samples, networks = reconstructed(originals, again, run.provenance), {network_name: network}
    return evaluate([protocol], samples, Reference(originals), networks, batch_size=options.batch_size).scores


def write_scores(out: Path, scores: Sequence[Score]) -> None:
    write_json(out, {score.name: score.record() for score in scores})
    for score in scores:
        print(f"{score.name:24} {score.value:10.4f}   {score.provenance.definition}")
    print(f"{scores[0].provenance.line()}\n{out}")


def write_lengths(out: Path, scores: Mapping[int, Sequence[Score]]) -> None:
    """scores: of every number of tokens."""
    found = {str(n): {score.name: score.record() for score in of_n} for n, of_n in scores.items()}
    write_json(out, {"lengths": found})
    values = {n: {score.name: score.value for score in of_n} for n, of_n in scores.items()}
    plot = out.with_name(f"{out.stem}-plot.png")
    save_length_plot(plot, values)
    print("\n".join(length_table(values)))
    print(f"{next(iter(scores.values()))[0].provenance.line()}\n{out}\n{plot}: the same, drawn")


def draw(path: Path, shown: Sequence[Sequence[Tensor]], names: Sequence[str] | None) -> None:
    """shown: of each picture the original and its reconstructions. names: of these, where there are several."""
    images = torch.stack([torch.stack(list(row)) for row in shown])  # (B, 1 + lengths, 3, H, W), or clips
    if images.ndim == 6:
        save_clips(path, images.flatten(0, 1))
        print(f"{path}: filmstrips, below every original its reconstruction")
    elif names is not None:
        save_clips(path, images.movedim(1, 2), names=names, scale=max(1, SHOWN // images.shape[-1]))
        print(f"{path}: every original with its reconstructions to the right")
    else:
        save_grid(images.flatten(0, 1), path, columns=8, scale=2)
        print(f"{path}: every original with its reconstruction to the right")


if __name__ == "__main__":
    try:
        main()
    except (RunError, CheckpointError, CheckpointMismatch, DataError, PictureError, FeatureError, OSError) as error:
        sys.exit(f"error: {error}")
