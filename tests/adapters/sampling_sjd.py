"""Calls of the `sampling-sjd` cases: one iteration, new drafts, couplings."""

import torch
from torch import Tensor

from sampling.speculative import jacobi
from tests.goldens import Case, Check


def sjd_iteration(case: Case, check: Check) -> dict[str, Tensor]:
    given = check.inputs
    step = jacobi.iterate(
        given["target_probs"],
        given["draft_probs"],
        given["draft_tokens"],
        given["fresh_tokens"],
        given["uniforms"],
        given["resample_uniforms"],
    )
    return {
        "committed": step.tokens,
        "num_committed": step.count,
        "next_drafts": step.drafts,
        "next_draft_probs": step.laws,
    }


def sjd_init_tokens(case: Case, check: Check) -> dict[str, Tensor]:
    """What is random in theirs is -1 in the case."""
    given, params = check.inputs, check.params
    parts = [name for name in ("committed", "carried") if name in given]
    tokens = torch.cat([given[name] for name in parts])
    tops = torch.cat([given[f"{name}_probs"] for name in parts]).argmax(-1)
    drafts = jacobi.initial_drafts(
        params["scheme"],
        tokens[None],
        tops[None],
        known=torch.tensor([len(tokens)]),
        random=torch.full((1, params["count"]), jacobi.ABSENT),
        row=params["row_length"],
        start=params["image_start"],
    )
    return {"tokens": drafts[0]}


def maximal_coupling(case: Case, check: Check) -> dict[str, Tensor]:
    return {"joint": jacobi.maximal_joint(check.inputs["new_probs"], check.inputs["old_probs"])}


def gumbel_coupling(case: Case, check: Check) -> dict[str, Tensor]:
    g = check.inputs["gumbels"]
    return {name: jacobi.gumbel_token(check.inputs[f"{name}_probs"], g) for name in ("new", "old")}


CALLS = {
    "sjd_iteration": sjd_iteration,
    "sjd_init_tokens": sjd_init_tokens,
    "maximal_coupling": maximal_coupling,
    "gumbel_coupling": gumbel_coupling,
}
