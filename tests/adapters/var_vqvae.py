"""VAR's multi-scale tokenizer, through from_published. The original clamps what it decodes."""

import torch
from torch import Tensor

from tests.goldens import Case, Check
from tokenizers_vis import from_published
from tokenizers_vis.protocol import Tokenizer


def tokenizer(case: Case) -> Tokenizer:
    config = {name: value for name, value in case.config.items() if name != "note"}
    return from_published("var-vqvae", case.weights(), config)


def encode(case: Case, check: Check) -> dict[str, Tensor]:
    made = tokenizer(case)
    parts = made.encode(check.inputs["images"]).split(made.scales.lengths, dim=1)
    return {f"tokens_{k}": part for k, part in enumerate(parts)}


def decode(case: Case, check: Check) -> dict[str, Tensor]:
    tokens = torch.cat([check.inputs[f"tokens_{k}"] for k in range(len(check.inputs))], dim=1)
    return {"images": tokenizer(case).decode(tokens).clamp(-1, 1)}


CALLS = {"encode": encode, "decode": decode}
