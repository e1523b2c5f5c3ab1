"""TiTok and TA-TiTok, through from_published."""

from torch import Tensor

from layers.spec import Condition
from tests.goldens import Case, Check
from tokenizers_vis import from_published
from tokenizers_vis.titok import TiTokTokenizer


def tokenizer(case: Case) -> TiTokTokenizer:
    return from_published("titok", case.weights(), case.config)


def encode(case: Case, check: Check) -> dict[str, Tensor]:
    return {"tokens": tokenizer(case).encode(check.inputs["images"], noise=check.inputs.get("noise"))}


def embed(case: Case, check: Check) -> dict[str, Tensor]:
    return {"codes": tokenizer(case).embed(check.inputs["tokens"])}


def decode(case: Case, check: Check) -> dict[str, Tensor]:
    condition = Condition(text=check.inputs["text"]) if "text" in check.inputs else None
    return {"images": tokenizer(case).decode(check.inputs["tokens"], condition=condition)}


CALLS = {"encode": encode, "embed": embed, "decode": decode}
