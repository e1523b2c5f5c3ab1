"""What fits what: every tokenizer, generator, head and sampler that work together, found by putting them together.

python scripts/matrix.py                            # print the tables
python scripts/matrix.py --out docs/matrix.md       # write them where the documentation keeps them

Everything is built at demo size from the records below. What does not fit refuses: its exception is the reason.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from generators.protocol import Generator
from layers.checkpoint import write_atomic
from layers.noise import Noise
from layers.record import build
from layers.spec import Condition
from sampling.confidence import Confidence
from sampling.decode import generate
from sampling.filters import Filter
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from sampling.smooth import Smooth
from tokenizers_vis.protocol import Tokenizer
from training.options import command_line, underscored
from training.run import CLASSES, feeding

PIXELS = 16  # height and width; of 4 x 4 tokens, or a pyramid up to that
LABELS = 3
WIDTH = 16  # of the generators


def record(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


VECTORS = record("VectorQuantizer", vocab_size=64, dim=4)
SMALL_VQ = {
    "image_size": PIXELS,
    "channels": 4,
    "encoder_mult": [1, 2, 2],
    "groups": 2,
    "z_channels": 4,
    "res_blocks": 1,
}
SMALL_KL = {"image_size": PIXELS, "channels": 2, "width": 4, "mult": [1, 2, 2], "res_blocks": 1, "groups": 2}
SMALL_TITOK = {"encoder_dim": WIDTH, "encoder_depth": 1, "encoder_heads": 2, "encoder_patch": 4}
SMALL_TITOK |= {"decoder_dim": WIDTH, "decoder_depth": 1, "decoder_heads": 2, "decoder_patch": 4}
SMALL_FLEXTOK = {"patch": 1, "encoder_dim": WIDTH, "encoder_depth": 1, "decoder_dim": WIDTH, "decoder_depth": 1}
SMALL_FLEXTOK |= {"head_dim": 8, "frequencies": 16, "steps": 2}
SMALL_DAR = {"encoder_patch": 4, "encoder_dim": WIDTH, "encoder_depth": 1, "code_dim": WIDTH, "code_depth": 1}
SMALL_DAR |= {"flow_patch": 4, "flow_dim": WIDTH, "flow_depth": 1, "head_dim": 8}
SMALL = {"dim": WIDTH, "depth": 2, "heads": 2, "num_classes": LABELS}

TOKENIZERS = {
    "VQTokenizer": record("VQTokenizer", quantizer=VECTORS, **SMALL_VQ),
    "VQTokenizer, FSQ": record("VQTokenizer", quantizer=record("FSQ", levels=[4, 4, 4]), **SMALL_VQ),
    "VQTokenizer, LFQ": record("VQTokenizer", quantizer=record("LFQ", bits=6), **SMALL_VQ),
    "MaskGITVQTokenizer": record(
        "MaskGITVQTokenizer", quantizer=VECTORS, image_size=PIXELS, width=4, mult=[1, 2, 2], blocks=1, groups=2
    ),
    "MultiScaleVQTokenizer": record(
        "MultiScaleVQTokenizer", quantizer=VECTORS, scales=[1, 2, 4], channels=4, mult=[1, 2, 2], res_blocks=1, groups=2
    ),
    "KLTokenizer": record("KLTokenizer", encoder_attention=[], **SMALL_KL),
    "TiTokTokenizer": record("TiTokTokenizer", quantizer=VECTORS, image_size=PIXELS, tokens=16, **SMALL_TITOK),
    "FlexTokTokenizer": record(
        "FlexTokTokenizer",
        quantizer=record("FSQ", levels=[4, 4, 4]),
        autoencoder=record("KLTokenizer", encoder_attention=[], **SMALL_KL),
        tokens=16,
        **SMALL_FLEXTOK,
    ),
    "DARTokenizer": record("DARTokenizer", quantizer=VECTORS, image_size=PIXELS, tokens=16, groups=4, **SMALL_DAR),
}
GENERATORS = {
    "NextToken": record("NextToken", mlp_hidden=32, **SMALL),
    "RAR": record("RAR", **SMALL),
    "Neighboring": record("Neighboring", mlp_hidden=32, **SMALL),
    "NextScale, VAR": record("NextScale", **SMALL),
    "NextScale, MVAR": record("NextScale", attention="scale", window=3, windowed_from=2, coarse_steps=2, **SMALL),
    "Masked, BERT": record("Masked", backbone="bert", rounds=3, **SMALL),
    "Masked, U-ViT": record("Masked", backbone="uvit", rounds=3, **SMALL),
    "MAR": record("MAR", buffer=2, rounds=3, **SMALL),
    "XAR, token": record("XAR", entity=record("TokenEntity"), **SMALL),
    "XAR, cell": record("XAR", entity=record("CellEntity", size=2), **SMALL),
    "XAR, subsample": record("XAR", entity=record("SubsampleEntity", size=2), **SMALL),
    "XAR, scale": record("XAR", entity=record("ScaleEntity", scales=3), **SMALL),
    "XAR, image": record("XAR", entity=record("ImageEntity"), **SMALL),
}
HEADS = {
    "Categorical": record("Categorical"),
    "FourierBins": record("FourierBins", frequencies=4),
    "Neighbour": record("Neighbour"),
    "DiffusionHead": record("DiffusionHead", hidden=16, depth=1, steps="ddim4", repeats=1),
    "FlowHead": record("FlowHead", hidden=16, depth=1, steps=3, repeats=1),
    "RectifiedFlowHead": record("RectifiedFlowHead", hidden=16, depth=1, steps=3, repeats=1),
    "MixtureHead": record("MixtureHead", components=3),
    "FourierDensity": record("FourierDensity", frequencies=4, bound=16.0, cells=64),
    "FieldHead": record("FieldHead", steps=3),
}
SAMPLERS = {
    "plain": Sampler(),
    "temperature": Sampler(Filter(temperature=0.8)),
    "guided": Sampler(guidance=Guidance(scale=2.0)),
    "greedy": Sampler(greedy=True),
    "filtered": Sampler(Filter(top_k=20, top_p=0.9)),
    "rounds": Sampler(rounds=2),
    "confidence": Sampler(confidence=Confidence(temperature=4.0), rounds=4),
    "smooth": Sampler(smooth=Smooth()),
}


@dataclass
class Matrix:
    """fits: (tokenizer, generator, head) -> the samplers that draw for them. refused: (one part, another) -> reason."""

    fits: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)


def make_tokenizer(name: str) -> Tokenizer:
    torch.manual_seed(0)
    return build(TOKENIZERS[name], CLASSES).eval()


def make_generator(tokenizer: Tokenizer, name: str, head: str | None = None) -> Generator:
    """head None: the generator's own choice. Raises ValueError where they do not fit."""
    torch.manual_seed(0)
    made = GENERATORS[name]
    if head is not None:
        made = record(made["class_path"], **made["init_args"], head=HEADS[head])
    return build(made, CLASSES, **feeding(made, tokenizer)).eval()


def draw(generator: Generator, sampler: str) -> Tensor:
    """Tokens of two samples. Raises ValueError where the sampler does not fit the generator."""
    condition = Condition(label=torch.arange(2) % LABELS)
    return generate(generator, condition, SAMPLERS[sampler], Noise(0, torch.arange(2))).tokens


def matrix() -> Matrix:
    """Put everything together that there is."""
    found = Matrix()

    def fit(one: str, other: str, make: Callable[..., Any], *arguments: Any) -> bool:
        try:
            make(*arguments)
        except ValueError as error:
            found.refused[one, other] = str(error)
            return False
        return True

    for t in TOKENIZERS:
        tokenizer = make_tokenizer(t)
        heads = [h for h in HEADS if fit(t, h, partial(build, HEADS[h], CLASSES, width=WIDTH, spec=tokenizer.spec))]
        for g in GENERATORS:
            if not fit(t, g, make_generator, tokenizer, g):
                continue
            for h in heads:
                if fit(g, h, make_generator, tokenizer, g, h):
                    generator = make_generator(tokenizer, g, h)
                    found.fits[t, g, h] = [s for s in SAMPLERS if fit(s, g, draw, generator, s)]
    return found


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def page(found: Matrix) -> str:
    """The whole of docs/matrix.md."""
    fits = table(
        ["tokenizer", "generator", "head", *SAMPLERS],
        ([*names, *("x" if s in samplers else "" for s in SAMPLERS)] for names, samplers in found.fits.items()),
    )
    kinds = (TOKENIZERS, GENERATORS, HEADS, SAMPLERS)
    by_reason: dict[str, list[tuple[str, str]]] = {}
    for pair in sorted(found.refused, key=lambda pair: [[side in kind for kind in kinds].index(True) for side in pair]):
        by_reason.setdefault(found.refused[pair], []).append(pair)
    refused = table(
        ["one", "the other", "reason"],
        (
            [*(", ".join(dict.fromkeys(f"`{side}`" for side in sides)) for sides in zip(*pairs, strict=True)), why]
            for why, pairs in by_reason.items()
        ),
    )
    count = sum(map(len, found.fits.values()))
    return "\n".join(
        [
            "# What fits what",
            "",
            "Made by `python scripts/matrix.py --out docs/matrix.md`, which puts together, at demo size, all that its records",
            f"name. {len(found.fits)} combinations of tokenizer, generator and head fit, {count} with their samplers (x). A",
            "test trains each combination for a few steps and draws with each of its samplers.",
            "",
            *fits,
            "",
            "## What is refused, and why",
            "",
            "The reasons are the messages of the exceptions, here with the sizes of the demo.",
            "",
            *refused,
            "",
        ]
    )


def write(out: Path | None = None) -> None:
    """Put everything together and say what fits.

    Args:
        out: a file to write; none: print
    """
    text = page(matrix())
    if out is None:
        print(text, end="")
    else:
        write_atomic(out, lambda draft: draft.write_text(text))
        print(f"{out}: written")


def main() -> None:
    auto_cli(write, as_positional=False, args=underscored())


if __name__ == "__main__":
    command_line(main)
