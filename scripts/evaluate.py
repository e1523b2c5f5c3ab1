"""Score samples against a reference under a named protocol, audit both, and write scores with all they depend on.

    python scripts/evaluate.py --samples samples.npz --reference ref.npz --protocol torch-fidelity
    python scripts/evaluate.py --samples samples.npz --reference digits --protocol classifier

A reference is an npz, a folder, or the name of a data set (then its --reference-split at the samples' size).
"""

import sys
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser, Namespace

from data.errors import DataError
from data.loader import evaluation_batches
from data.sets import BUILT_IN, ON_DISK, open_set
from eval.audit import Audit
from eval.classifier import load_classifier, train_classifier
from eval.features import FeatureError, FeatureNetwork
from eval.files import write_json
from eval.inception import inception_network
from eval.pictures import PictureError, PictureSet, from_batches, read_pictures
from eval.score import accuracy_score, frechet_score, look


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    made.add_argument(
        "--samples", type=Path, required=True, help="NAME.npz as scripts/sample.py writes it, or a folder."
    )
    made.add_argument("--reference", type=str, required=True, help="NAME.npz, a folder, or the name of a data set.")
    made.add_argument("--reference-split", type=str, default="val", help="Split of a data set.")
    made.add_argument("--reference-root", type=str | None, default=None, help="Folder of a data set on disk.")
    made.add_argument(
        "--protocol",
        type=Literal["torch-fidelity", "classifier"],
        required=True,
        help="torch-fidelity: FID. classifier: label accuracy and a Fréchet distance of its own name.",
    )
    made.add_argument(
        "--inception-weights", type=Path | None, default=None, help="Local weights file. Default: downloaded once."
    )
    made.add_argument(
        "--classifier",
        type=Path | None,
        default=None,
        help="Weights file of a classifier. Default: trained now on the training split of the reference.",
    )
    made.add_argument("--seed", type=int, default=0, help="Seed of a classifier that is trained now.")
    made.add_argument("--batch-size", type=int, default=64, help="Pictures the network sees at once.")
    made.add_argument("--device", type=str | None, default=None, help="Default: the GPU where there is one.")
    made.add_argument("--out", type=Path | None, default=None, help="JSON. Default: SAMPLES.PROTOCOL.json.")
    made.add_argument("--overwrite", type=bool, default=False, help="Replace an existing --out.")
    return made


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    name = options.samples.name.removesuffix(".npz")
    out = options.out or options.samples.with_name(f"{name}.{options.protocol}.json")
    if out.exists() and not options.overwrite:
        raise FileExistsError(f"{out}: exists; choose another --out, or --overwrite true")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    samples = read_pictures(options.samples)
    size = next(samples.batches(1)).shape[-1]
    reference = open_reference(options, options.reference_split, size)
    network = open_network(options, size, device)
    labels = [pictures.labels for pictures in (samples, reference) if pictures.labels is not None]
    num_classes = int(torch.cat(labels).max()) + 1 if labels else None
    audits = [Audit(pictures.name, num_classes=num_classes) for pictures in (samples, reference)]
    ours, theirs = (
        look(network, pictures, options.batch_size, audit)
        for pictures, audit in zip((samples, reference), audits, strict=True)
    )
    scores = [frechet_score(ours, theirs)]
    if ours.right is not None:
        scores.append(accuracy_score(ours))
    if theirs.right is not None:
        scores.append(accuracy_score(theirs, "classifier_accuracy"))
    audit_record = {role: audit.record() for role, audit in zip(("samples", "reference"), audits, strict=True)}
    write_json(out, {score.name: score.record() for score in scores} | {"audit": audit_record})
    for score in scores:
        print(f"{score.name:40} {score.value:12.6g}\n    {score.provenance.line()}")
    for audit in audits:
        print("\n".join(audit.lines()))
    print(f"with its whole provenance: {out}")


def open_reference(options: Namespace, split: str, size: int) -> PictureSet:
    if options.reference not in {**BUILT_IN, **ON_DISK}:
        return read_pictures(options.reference)
    pictures = open_set(options.reference, split=split, root=options.reference_root, size=size)
    batches = partial(evaluation_batches, pictures)
    labels = torch.from_numpy(pictures.labels)
    return from_batches(f"{options.reference} {split}", len(pictures), batches, pictures.describe(), labels)


def open_network(options: Namespace, size: int, device: str) -> FeatureNetwork:
    if options.protocol == "torch-fidelity":
        return inception_network(options.inception_weights, device)
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


if __name__ == "__main__":
    try:
        main()
    except (PictureError, FeatureError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
