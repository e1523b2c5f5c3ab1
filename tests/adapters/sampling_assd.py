"""Calls of the `sampling-assd` cases: masks, and whole decodings with a table in place of the network."""

import torch
from torch import Tensor

from sampling.speculative.any_subset import AnySubset, joint_blocked, parallel_blocked
from tests.goldens import Case, Check

DRAFTS = {"self": "self", "ngram": "bigram"}  # theirs -> ours


def assd_masks(case: Case, check: Check) -> dict[str, Tensor]:
    rank, prompt = check.inputs["rank"][None], check.params["prompt_tokens"]
    return {
        "joint": joint_blocked(rank, prompt)[0],
        "parallel": parallel_blocked(rank, prompt, check.params["decoded"])[0],
    }


def assd_decode(case: Case, check: Check) -> dict[str, Tensor]:
    given, params = check.inputs, check.params
    bias, pair = given["bias"], given["pair"]
    place = torch.arange(len(bias))

    def table(tokens: Tensor, blocked: Tensor) -> Tensor:
        """logits[t] = bias[t] + sum over visible j of pair[t, j, token_j]."""
        seen = pair[place[:, None], place, tokens[:, None]]  # (B, L, L, V)
        return bias + (seen * ~blocked[..., None]).sum(2)

    rule = AnySubset(
        params["k"],
        DRAFTS[params["draft"]],
        params.get("temperature", 1.0),
        plain_oracle=not params.get("temperature_oracle", True),
        slack=params.get("r_atol", 0.0),
    )
    tokens, calls = rule.decode(
        table,
        given["prompt"][None],
        given["rank"][None],
        params["prompt_tokens"],
        params["mask_token"],
        bias.shape[1],
        torch.stack((given["draft_uniforms"], given["accept_uniforms"]), dim=1)[None],
        given["resample_uniforms"][None],
    )
    return {"tokens": tokens[0], "nfe": calls}


CALLS = {"assd_masks": assd_masks, "assd_decode": assd_decode}
