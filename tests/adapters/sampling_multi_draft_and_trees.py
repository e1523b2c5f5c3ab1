"""Calls of the `sampling-multi-draft-and-trees` cases: several candidates for one place."""

import torch
from torch import Tensor

from sampling.speculative import multi_draft
from tests.goldens import Case, Check


def kseq_select(case: Case, check: Check) -> dict[str, Tensor]:
    p, q, candidates, u = (check.inputs[x] for x in ("target_probs", "draft_probs", "candidates", "uniforms"))
    rho, _, alpha = multi_draft.k_seq_rho(p.double(), q.double(), check.params["k"])
    choice = multi_draft.k_seq(p, q, candidates, u)
    return {
        "rho": rho,
        "alpha": alpha,
        "accept_prob": choice.accept_prob,
        "choice": choice.index,
        "residual": choice.law,
    }


def optimal_acceptance(case: Case, check: Check) -> dict[str, Tensor]:
    p, q = check.inputs["target_probs"], check.inputs["draft_probs"]
    return {"alpha": multi_draft.optimal_acceptance(p, q, check.params["k"])}


def rrs_without_replacement(case: Case, check: Check) -> dict[str, Tensor]:
    """Their residual is 0 where a candidate was taken."""
    given = check.inputs
    choice = multi_draft.recursive_rejection(
        given["target_probs"], given["draft_probs"], given["candidates"], given["uniforms"]
    )
    none = choice.index == multi_draft.NONE
    return {"choice": choice.index, "residual": torch.where(none[:, None], choice.law, 0)}


def gumbel_top_k(case: Case, check: Check) -> dict[str, Tensor]:
    log_probs, gumbels = check.inputs["log_probs"], check.inputs["gumbels"]
    return {"tokens": multi_draft.gumbel_top_k(log_probs, gumbels, check.params["k"])}


CALLS = {
    "kseq_select": kseq_select,
    "optimal_acceptance": optimal_acceptance,
    "rrs_without_replacement": rrs_without_replacement,
    "gumbel_top_k": gumbel_top_k,
}
