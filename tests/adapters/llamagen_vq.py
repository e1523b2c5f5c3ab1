"""The LlamaGen VQ tokenizer, through from_published."""

from torch import Tensor

from tests.goldens import Case, Check
from tokenizers_vis import from_published
from tokenizers_vis.protocol import Tokenizer


def tokenizer(case: Case) -> Tokenizer:
    config = {name: value for name, value in case.config.items() if name != "note"}
    return from_published("llamagen-vq", case.weights(), config)


def encode(case: Case, check: Check) -> dict[str, Tensor]:
    return {"tokens": tokenizer(case).encode(check.inputs["images"])}


def decode(case: Case, check: Check) -> dict[str, Tensor]:
    return {"images": tokenizer(case).decode(check.inputs["tokens"])}


CALLS = {"encode": encode, "decode": decode}
