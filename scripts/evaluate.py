"""Score samples against a reference under named protocols, audit both, and write scores with all they depend on.

    python scripts/evaluate.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --protocol adm
    python scripts/evaluate.py --samples samples.npz --reference /data/val --protocol all
    accelerate launch scripts/evaluate.py --run runs/demo --num 5000 --reference digits --protocol rc512 --out demo.json
    python scripts/evaluate.py --samples clips.npz --reference /data/ucf101 --protocol larp

With --run or --published, samples go from the model to the networks without a file between, rounded by each protocol's
own rule; a tokenizer's run reconstructs the reference. All protocols share one pass. Stop it and repeat it to resume.
A reference is an npz, a folder, a file of scripts/make_reference.py, or the name of a data set (its --reference-split).
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from torch.utils.data import Subset

from data.errors import DataError
from data.loader import evaluation_batches
from data.sets import BUILT_IN, ON_DISK, open_set
from eval.classifier import load_classifier, train_classifier
from eval.clip_sets import read_videos
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
from eval.references import StatisticsCache
from eval.weights import EXIT_CODE, MetricWeightsMissing, given_weights
from layers.checkpoint import CheckpointError
from layers.keymap import CheckpointMismatch
from layers.spec import Condition
from sampling.shards import plan_labels
from tokenizers_vis.protocol import Tokenizer
from training.decoder import Decoder, add_decoder_arguments, open_decoder
from training.published import PublishedError
from training.run import RunError, load_run

SEVERAL = {"all": GENERATION, "all-reconstruction": RECONSTRUCTION}
PROTOCOLS = {**PICTURES, **CLIPS}
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
    of_pictures = [protocol for protocol in protocols if protocol.name in PICTURES]
    if of_pictures:
        if options.samples is not None:
            samples = read_pictures(options.samples)
            size = next(samples.batches(1)).shape[-1]
            yield "pictures", of_pictures, samples, reference_of(options, options.reference_split, size)
        elif options.run is not None and load_run(options.run).generator is None:
            tokenizer = load_run(options.run, device)
            reference = reference_of(options, options.reference_split, tokenizer.tokenizer.spec.decoded[1])
            if reference.pictures is None:
                raise PictureError(f"{options.reference}: holds no pictures that {options.run} could reconstruct")
            samples = reconstructions(tokenizer.tokenizer, reference.pictures, tokenizer.provenance, device)
            yield "pictures", of_pictures, samples, reference
        else:
            decoder = open_decoder(cli, arguments, device)
            samples = decoded(decoder, options, of_pictures[0])
            size = decoder.tokenizer.spec.decoded[1]
            yield "pictures", of_pictures, samples, reference_of(options, options.reference_split, size)
    for protocol in protocols:
        if protocol.name in CLIPS:
            if options.samples is None:
                raise PictureError(f"--protocol {protocol.name} scores videos; give them by --samples")
            samples, real = protocol.samples(read_videos(options.samples)), read_videos(options.reference)
            height, width = next(samples.batches(1)).shape[-2:]
            size = height if height == width else None
            yield protocol.name, [protocol], samples, Reference(protocol.real(real, size))
            if options.floor:
                first, second = protocol.real_halves(real, size, options.seed)
                yield f"{protocol.name}-floor", [protocol.floor()], first, Reference(second)


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


def reconstructions(tokenizer: Tokenizer, originals: PictureSet, source: Any, device: torch.device) -> PictureSet:
    """What the tokenizer makes of the reference, as floats on its device."""

    @torch.inference_mode()
    def again(pictures: Tensor) -> Tensor:
        return tokenizer.decode(tokenizer.encode(from_uint8(pictures.to(device))))

    def read(size: int, start: int, stop: int) -> Iterator[Tensor]:
        return map(again, originals.batches(size, start, stop))

    origin = Origin.of_reconstructions("not yet", source)
    return PictureSet(f"reconstructions of {originals.name}", originals.count, read, origin, floats=True)


def reference_of(options: Namespace, split: str, size: int) -> Reference:
    if options.reference not in {**BUILT_IN, **ON_DISK}:
        return open_reference(options.reference)
    pictures = open_set(options.reference, split=split, root=options.reference_root, size=size)

    def batches(size: int, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        return evaluation_batches(Subset(pictures, range(start, stop)), size)

    labels = torch.from_numpy(pictures.labels)
    return Reference(from_batches(f"{options.reference} {split}", len(pictures), batches, pictures.describe(), labels))


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
