"""The FID network's weights from the TensorFlow graph classify_image_graph_def.pb, as a safetensors file.

    python scripts/convert_inception.py --graph classify_image_graph_def.pb --out inception.safetensors
    python scripts/evaluate.py … --metric-weights inception=inception.safetensors

TensorFlow is not needed. The checksum of the file is not that of the published torch file, so its scores are marked as
those of unpublished weights.
"""

import sys
from pathlib import Path

from jsonargparse import ArgumentParser
from safetensors.torch import save

from eval.features import FeatureError
from eval.files import write_whole
from eval.tf_inception import read_graph


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    made.add_argument("--graph", type=Path, required=True, help="The TensorFlow graph.")
    made.add_argument("--out", type=Path, required=True, help="NAME.safetensors.")
    return made


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.out.suffix != ".safetensors":
        raise FeatureError(f"--out {options.out}: must end in .safetensors")
    state = read_graph(options.graph)
    write_whole(options.out, save(state))
    print(f"{options.out}: {len(state)} tensors")


if __name__ == "__main__":
    try:
        main()
    except (FeatureError, OSError) as error:
        sys.exit(f"error: {error}")
