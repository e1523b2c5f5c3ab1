"""Make a reference file of real pictures or videos: what the networks of protocols say of them, once, to be scored against.

    python scripts/make_reference.py --pictures imagenet --root /data/imagenet --split val --size 256 \
        --protocol llamagen-rfid --out val256.safetensors
    python scripts/evaluate.py --samples samples.npz --reference val256.safetensors --protocol llamagen-rfid

The file carries checksum, count and size of the pictures, network, weights and preprocessing of every statistic, and
their audit. An evaluation by another network or of another size ends in an error. Stop it and repeat it to resume.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from torch.utils.data import Subset

from data.errors import DataError
from data.loader import evaluation_batches
from data.sets import BUILT_IN, ON_DISK, open_set
from eval.audit import Audit
from eval.clip_sets import read_videos
from eval.features import FeatureError
from eval.look import look
from eval.networks import open_network
from eval.pictures import PictureError, PictureSet, from_batches, read_pictures
from eval.protocols import CLIPS, PICTURES
from eval.references import save_reference
from eval.score import wanted_of_reference
from eval.weights import EXIT_CODE, MetricWeightsMissing, given_weights

PROTOCOLS = {name: protocol for name, protocol in {**PICTURES, **CLIPS}.items() if name != "classifier"}


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    made.add_argument(
        "--pictures", type=str, required=True, help="NAME.npz, a folder, or a data set; of clips, videos or an npz."
    )
    made.add_argument("--split", type=str, default="val", help="Split of a data set: train, val or all.")
    made.add_argument("--root", type=str | None, default=None, help="Folder of a data set on disk.")
    made.add_argument("--size", type=int | None, default=None, help="Side in pixels, of a data set and of videos.")
    made.add_argument(
        "--protocol", type=Literal[tuple(PROTOCOLS)], nargs="+", required=True, help="What the file is to serve."
    )
    made.add_argument("--metric-weights", type=str, nargs="+", default=[], help="NAME=FILE of metric networks.")
    made.add_argument("--allow-download", type=bool, default=False, help="Download metric weights that are not found.")
    made.add_argument("--batch-size", type=int, default=64, help="Pictures the networks see at once.")
    made.add_argument("--device", type=str | None, default=None, help="Default: the GPU where there is one.")
    made.add_argument("--out", type=Path, required=True, help="NAME.safetensors to write.")
    made.add_argument("--overwrite", type=bool, default=False, help="Replace an existing --out.")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.out.suffix != ".safetensors":
        raise PictureError(f"--out {options.out}: a reference file is called NAME.safetensors")
    if options.out.exists() and not options.overwrite:
        raise FileExistsError(f"{options.out}: exists; choose another --out, or --overwrite true")
    accelerator = Accelerator(cpu=options.device == "cpu")
    device = torch.device(options.device or accelerator.device)
    protocols = [PROTOCOLS[name] for name in dict.fromkeys(options.protocol)]
    pictures = open_pictures(options)
    given = given_weights(options.metric_weights)
    wants = wanted_of_reference(protocols, pictures)
    networks = {
        name: open_network(name, device, given, options.allow_download)
        for name in dict.fromkeys(want.network for want in wants)
    }
    audit, work = Audit(pictures.name), options.out.with_name(f".{options.out.name}.work")
    seen = look(pictures, wants, networks, options.batch_size, audit=audit, accelerator=accelerator, work=work)
    accelerator.wait_for_everyone()  # no process needs the work folder any more
    if accelerator.is_main_process:
        save_reference(options.out, seen, options.protocol, audit.record())
        shutil.rmtree(work)
        print("\n".join(audit.lines()))
        print(f"{options.out}: {audit.count} of {pictures.name}, sha256 {audit.sha256()[:8]}, for {options.protocol}")


def open_pictures(options: Namespace) -> PictureSet:
    clips = [name for name in options.protocol if name in CLIPS]
    if clips:
        if len(options.protocol) > 1:
            raise PictureError(f"--protocol {' '.join(options.protocol)}: {clips[0]} cuts its own clips; one at a time")
        return CLIPS[clips[0]].real(read_videos(options.pictures), options.size)
    if options.pictures not in {**BUILT_IN, **ON_DISK}:
        return read_pictures(options.pictures)
    size = {} if options.size is None else {"size": options.size}
    pictures = open_set(options.pictures, split=options.split, root=options.root, **size)

    def batches(size: int, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        return evaluation_batches(Subset(pictures, range(start, stop)), size)

    labels = torch.from_numpy(pictures.labels)
    return from_batches(f"{options.pictures} {options.split}", len(pictures), batches, pictures.describe(), labels)


def command() -> None:
    """`main`, whose errors end in one line, and in a status of its own where a metric's weights are missing."""
    try:
        main()
    except MetricWeightsMissing as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except (PictureError, FeatureError, DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    command()
