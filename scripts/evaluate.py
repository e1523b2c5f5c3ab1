"""Score samples against a reference under named protocols, audit both, and write scores with all they depend on.

    python scripts/evaluate.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --protocol adm
    python scripts/evaluate.py --samples samples.npz --reference /data/val --protocol all
    accelerate launch scripts/evaluate.py --run runs/demo --num 5000 --reference digits --protocol rc512 --out demo.json
    python scripts/evaluate.py --samples clips.npz --reference /data/ucf101 --protocol larp
    python scripts/evaluate.py --run runs/my-larp-ar --reference ucf101 --reference-root /data/UCF-101 \\
        --reference-split train --protocol larp --out larp.json

With --run or --published, samples go from the model to the networks without a file between, rounded by each protocol's
own rule; a tokenizer's run reconstructs the reference, a generator of what follows given frames is given those of the
reference. Protocols of pictures share one pass. Stop it and repeat it to resume. A reference is an npz, a folder, a file of
scripts/make_reference.py, or the name of a data set (its --reference-split).
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from torch.utils.data import Subset

from data.errors import DataError
from data.loader import evaluation_batches
from data.sets import BUILT_IN, OF_VIDEOS, ON_DISK, open_set
from data.source import Videos
from eval.classifier import load_classifier, train_classifier
from eval.clip_sets import AS_DECODED, VideoSet, read_videos
from eval.evaluation import Evaluated, Reference, evaluate, open_reference
from eval.features import FeatureError, FeatureNetwork
from eval.files import write_json, write_whole
from eval.markdown import markdown_table
from eval.networks import open_network
from eval.pictures import PictureError, PictureSet, from_batches, read_pictures
from eval.pixels import from_uint8
from eval.protocol import Protocol
from eval.protocols import CLIPS, GENERATION, PICTURES, RECONSTRUCTION
from eval.provenance import Origin
from eval.reconstruction import reconstructed
from eval.references import StatisticsCache
from eval.weights import EXIT_CODE, MetricWeightsMissing, given_weights
from layers.checkpoint import CheckpointError
from layers.keymap import CheckpointMismatch
from layers.spec import Condition
from sampling.shards import plan_labels
from training.decoder import Decoder, add_decoder_arguments, open_decoder
from training.published import PublishedError
from training.run import Run, RunError, load_run

SEVERAL = {"all": GENERATION, "all-reconstruction": RECONSTRUCTION}
PROTOCOLS = {**PICTURES, **CLIPS}
FRAMES_AT_ONCE = 64  # of a video of a data set
USERS = (PictureError, FeatureError, DataError, RunError, PublishedError, CheckpointError, CheckpointMismatch, OSError)


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    made.add_argument(
        "--samples", type=Path | None, default=None, help="NAME.npz as scripts/sample.py writes it, or a folder."
    )
    add_decoder_arguments(made)
    made.add_argument("--num", type=int | None, default=None, help="Samples of a model. Default: the protocol's count.")
    made.add_argument(
        "--class-plan",
        type=Literal["balanced", "random"] | None,
        default=None,
        help="Classes of a model's samples. Default: the protocol's.",
    )
    made.add_argument(
        "--reference", type=str, required=True, help="NAME.npz, NAME.safetensors, a folder, or the name of a data set."
    )
    made.add_argument("--reference-split", type=str, default="val", help="Split of a data set.")
    made.add_argument("--reference-root", type=str | None, default=None, help="Folder of a data set on disk.")
    made.add_argument(
        "--reference-stride", type=int, default=1, help="Of a data set of videos: every so many frames, as trained on."
    )
    made.add_argument(
        "--frames",
        type=int | None,
        default=None,
        help="Of a generator of what follows: how many frames it is given. Default: as trained.",
    )
    made.add_argument(
        "--floor",
        type=bool,
        default=False,
        help="Of clips, also score one half of the reference's videos against the other: the value of a perfect model.",
    )
    made.add_argument(
        "--protocol",
        type=Literal[(*SEVERAL, *PROTOCOLS)],
        nargs="+",
        required=True,
        help=f"One or several. all: {', '.join(it.name for it in GENERATION)} (FID and its kin). "
        f"all-reconstruction: {', '.join(it.name for it in RECONSTRUCTION)}. classifier: label accuracy.",
    )
    made.add_argument(
        "--metric-weights", type=str, nargs="+", default=[], help="NAME=FILE of metric networks, as inception=x.pth."
    )
    made.add_argument("--allow-download", type=bool, default=False, help="Download metric weights that are not found.")
    made.add_argument(
        "--classifier",
        type=Path | None,
        default=None,
        help="Weights file of a classifier. Default: trained now on the training split of the reference, from --seed.",
    )
    made.add_argument("--batch-size", type=int, default=64, help="Pictures the networks see at once.")
    made.add_argument("--device", type=str | None, default=None, help="Default: the GPU where there is one.")
    made.add_argument(
        "--cache", type=Path | None, default=None, help="Folder of statistics of references, kept by their content."
    )
    made.add_argument("--out", type=Path | None, default=None, help="JSON. Default: SAMPLES.PROTOCOL.json.")
    made.add_argument(
        "--report",
        type=Path | None,
        default=None,
        help="Folder of a page of pictures, nearest neighbours, classes and intervals, and of a table for a paper.",
    )
    made.add_argument("--overwrite", type=bool, default=False, help="Replace an existing --out.")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    cli = parser()
    options = cli.parse_args(arguments)
    if sum(source is not None for source in (options.samples, options.run, options.published)) != 1:
        cli.error("give one of --samples FILE, --run FOLDER and --published NAME")
    if options.samples is None and options.out is None:
        cli.error("give --out FILE for the scores of a model's samples")
    asked = dict.fromkeys(it for name in options.protocol for it in SEVERAL.get(name) or (PROTOCOLS[name],))
    out = options.out or options.samples.with_name(
        f"{options.samples.name.removesuffix('.npz')}.{'+'.join(options.protocol)}.json"
    )
    if out.exists() and not options.overwrite:
        raise FileExistsError(f"{out}: exists; choose another --out, or --overwrite true")
    accelerator = Accelerator(cpu=options.device == "cpu")
    device = torch.device(options.device or accelerator.device)
    work = out.with_name(f".{out.name}.work")
    title = str(options.samples or options.run or options.published)
    result = Evaluated()
    for name, protocols, samples, reference in sets(cli, arguments, list(asked), device):
        networks, missing = open_networks(options, protocols, samples, device)
        result.join(
            evaluate(
                protocols,
                samples,
                reference,
                networks,
                missing=missing,
                batch_size=options.batch_size,
                accelerator=accelerator,
                work=work / name,
                cache=options.cache and StatisticsCache(options.cache),
                page=title if options.report is not None and name == "pictures" else None,
            )
        )
    accelerator.wait_for_everyone()  # no process needs the work folder any more
    if accelerator.is_main_process:
        write_json(out, result.record())
        if options.report is not None:
            for page in result.pages:
                page.save(options.report / "report.html")
            table = markdown_table({title: result.scores}, {title: result.intervals})
            write_whole(options.report / "table.md", table.encode())
        shutil.rmtree(work)
        print("\n".join(result.lines()))
        print(f"with its whole provenance: {out}")


def sets(
    cli: ArgumentParser, arguments: Sequence[str] | None, protocols: Sequence[Protocol], device: torch.device
) -> Iterator[tuple[str, list[Protocol], PictureSet, Reference]]:
    """Protocols that see the same sets, with them: all of pictures together, every one of clips with its own cuts."""
    options = cli.parse_args(arguments)
    model = opened(cli, arguments, device)
    moves = model is not None and model.tokenizer.spec.decoded[0] > 1
    if options.frames is not None and not (isinstance(model, Decoder) and model.continues):
        raise PictureError("--frames: no generator that is given frames makes these samples; leave it out")
    for protocol in protocols:
        if model is not None and moves != (protocol.name in CLIPS):
            known = ", ".join(CLIPS if moves else PICTURES)
            what = "clips" if moves else "pictures"
            raise PictureError(f"--protocol {protocol.name}: this model makes {what}; their protocols are {known}")
    of_pictures = [protocol for protocol in protocols if protocol.name in PICTURES]
    if of_pictures and model is None:
        samples = read_pictures(options.samples)
        size = next(samples.batches(1)).shape[-1]
        yield "pictures", of_pictures, samples, reference_of(options, options.reference_split, size)
    elif of_pictures:
        reference = reference_of(options, options.reference_split, model.tokenizer.spec.decoded[1])
        yield "pictures", of_pictures, made_by(model, options, of_pictures[0], reference), reference
    for protocol in protocols:
        if protocol.name in CLIPS:
            real = real_videos(options)
            if model is None:
                samples = protocol.samples(read_videos(options.samples))
                size = side(next(samples.batches(1)).shape)
            else:
                frames, size = model.tokenizer.spec.decoded[0], side(model.tokenizer.spec.decoded)
                cut = replace(protocol.cut, length=frames) if protocol.single_frames else protocol.cut
                originals = replace(protocol, single_frames=False, cut=cut).real(real, size)
                samples = protocol.of_model(made_by(model, options, protocol, Reference(originals)), frames)
            yield protocol.name, [protocol], samples, Reference(protocol.real(real, size))
            if options.floor:
                first, second = protocol.real_halves(real, size, options.seed)
                yield f"{protocol.name}-floor", [protocol.floor()], first, Reference(second)


def side(shape: Sequence[int]) -> int | None:
    """Of squares (..., H, W), else None."""
    return shape[-1] if shape[-1] == shape[-2] else None


def opened(cli: ArgumentParser, arguments: Sequence[str] | None, device: torch.device) -> Run | Decoder | None:
    """What makes the samples: the run of a tokenizer, or a generator with its sampler; None: they lie in a file."""
    options = cli.parse_args(arguments)
    if options.samples is not None:
        return None
    if options.run is not None and (run := load_run(options.run, device)).generator is None:
        return run
    return open_decoder(cli, arguments, device)


def made_by(model: Run | Decoder, options: Namespace, protocol: Protocol, reference: Reference) -> PictureSet:
    """Samples of a model as floats on its device: of classes, or of what the reference shows.

    Raises PictureError where a reference is needed that holds no pictures or clips.
    """
    if isinstance(model, Decoder) and not model.continues:
        return decoded(model, options, protocol)
    if reference.pictures is None:
        raise PictureError(f"{options.reference}: holds no pictures that {options.run} could reconstruct")
    if isinstance(model, Decoder):
        return predicted(model, options, reference.pictures)
    tokenizer = model.tokenizer
    device = next(tokenizer.parameters()).device

    @torch.inference_mode()
    def again(images: Tensor) -> Tensor:
        return tokenizer.decode(tokenizer.encode(images.to(device)))

    return reconstructed(reference.pictures, again, model.provenance)


def decoded(decoder: Decoder, options: Namespace, protocol: Protocol) -> PictureSet:
    """Samples of a model as floats on its device, numbered and planned as the protocol asks."""
    count = options.num or protocol.count
    if count is None:
        raise PictureError(f"protocol {protocol.name} asks for no number of samples; give --num N")
    plan = options.class_plan or protocol.class_sampling or "balanced"
    labels = plan_labels(count, decoder.num_classes, plan, options.seed)

    def read(size: int, start: int, stop: int) -> Iterator[Tensor]:
        for index in torch.arange(start, stop).split(size):
            yield decoder(index, Condition(label=labels[index]))

    origin = Origin.of_samples({**decoder.settings, "class_plan": plan})
    return PictureSet(f"samples of {options.run or options.published}", count, read, origin, labels, floats=True)


def predicted(decoder: Decoder, options: Namespace, originals: PictureSet) -> PictureSet:
    """What a generator makes of the first frames of the reference, sample i of its clip i."""
    frames = decoder.given[0] if options.frames is None else options.frames
    whole = decoder.tokenizer.spec.decoded[0]
    if not 1 <= frames < whole:
        raise PictureError(f"--frames is {frames}, this model makes clips of {whole} frames: give 1 to {whole - 1}")
    count = originals.count if options.num is None else min(options.num, originals.count)

    def read(size: int, start: int, stop: int) -> Iterator[Tensor]:
        for clips in originals.batches(size, start, stop):
            index = torch.arange(start, start + len(clips))
            shown = clips[:, :, :frames]
            yield decoder.predict(index, shown if originals.floats else from_uint8(shown))
            start += len(clips)

    origin = Origin.of_samples({**decoder.settings, "given_frames": frames, "of": originals.name})
    return PictureSet(f"samples of {options.run or options.published}", count, read, origin, floats=True)


def reference_of(options: Namespace, split: str, size: int) -> Reference:
    if options.reference not in {**BUILT_IN, **ON_DISK}:
        return open_reference(options.reference)
    pictures = open_set(options.reference, split=split, root=options.reference_root, size=size)

    def batches(size: int, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        return evaluation_batches(Subset(pictures, range(start, stop)), size)

    labels = torch.from_numpy(pictures.labels)
    return Reference(from_batches(f"{options.reference} {split}", len(pictures), batches, pictures.describe(), labels))


def real_videos(options: Namespace) -> VideoSet:
    """The reference of a protocol of clips: a file, a folder, or a data set of videos."""
    if options.reference not in {**BUILT_IN, **ON_DISK}:
        return read_videos(options.reference)
    if options.reference not in OF_VIDEOS:
        raise PictureError(f"{options.reference}: holds pictures; the data sets of videos are {', '.join(OF_VIDEOS)}")
    clips = open_set(options.reference, split=options.reference_split, root=options.reference_root)
    source, stride = clips.source, options.reference_stride
    counts = (-(-source.pictures.counts() // stride)).tolist()
    names = [f"{source.path}/{name}" for name in source.names]
    if 0 in counts:
        raise PictureError(f"{names[counts.index(0)]}: no readable video; copy it again, or leave it out")

    def frames(numbers: Sequence[int]) -> Iterator[Iterator[Tensor]]:
        return (frames_of_video(source.pictures, number, counts[number], stride) for number in numbers)

    record = {**clips.describe(), "stride": stride}
    labels = torch.from_numpy(source.labels)
    name = f"{options.reference} {options.reference_split}"
    return VideoSet(name, names, counts, frames, Origin.of_data(AS_DECODED, record), labels)


def frames_of_video(videos: Videos, number: int, count: int, stride: int) -> Iterator[Tensor]:
    """uint8 (3, H, W) each, some in memory at a time."""
    for start in range(0, count, FRAMES_AT_ONCE):
        chosen = np.arange(start, min(start + FRAMES_AT_ONCE, count)) * stride
        yield from torch.from_numpy(videos.read(number, lambda _, chosen=chosen: chosen)).movedim(-1, 1)


def open_networks(
    options: Namespace, protocols: Sequence[Protocol], samples: PictureSet, device: torch.device
) -> tuple[dict[str, FeatureNetwork], dict[str, str]]:
    """Those that the protocols name, and why some cannot be had. Raises MetricWeightsMissing where none can."""
    found, faults, given = {}, {}, given_weights(options.metric_weights)
    for name in dict.fromkeys(name for protocol in protocols for name in protocol.networks):
        try:
            if name == "classifier":
                found[name] = open_classifier(options, next(samples.batches(1)).shape[-1], device)
            else:
                found[name] = open_network(name, device, given, options.allow_download)
        except MetricWeightsMissing as error:
            faults[name] = error
    if not found:
        raise next(iter(faults.values()))
    return found, {name: str(error).partition(";")[0] for name, error in faults.items()}


def open_classifier(options: Namespace, size: int, device: torch.device) -> FeatureNetwork:
    if options.classifier is not None:
        return load_classifier(options.classifier, device).network()
    if options.reference not in {**BUILT_IN, **ON_DISK}:
        raise FeatureError(
            f"--protocol classifier: {options.reference} is no data set to train a classifier on; "
            "give --classifier FILE, or the name of a data set as --reference"
        )
    pictures = open_set(options.reference, split="train", root=options.reference_root, size=size)
    images = torch.cat([batch["image"] for batch in evaluation_batches(pictures, 256)])
    labels = torch.from_numpy(pictures.labels)
    return train_classifier(images, labels, len(pictures.classes), options.seed, device=device).network()


def command() -> None:
    """`main`, whose errors end in one line, and in a status of its own where a metric's weights are missing."""
    try:
        main()
    except MetricWeightsMissing as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except USERS as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    command()
