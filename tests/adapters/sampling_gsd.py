"""Calls of the `sampling-gsd` cases: the released grouping, and the rate of a partition."""

import torch
from torch import Tensor

from sampling.speculative import grouped
from tests.adapters.sampling_speculative import named
from tests.goldens import Case, Check


def gsd_verify(case: Case, check: Check) -> dict[str, Tensor]:
    given = check.inputs
    p, q, draft, table = (given[x] for x in ("target_probs", "draft_probs", "draft_tokens", "embedding_sqdist"))
    n = draft.shape[1]
    groups = grouped.rank_windows(
        given["target_logits"][:, :n],
        p[:, :n],
        draft,
        lambda token, others: table[token[..., None], others],
        half=check.params["half_window"],
        p_near=check.params["p_thr"],
        d_near=check.params["d_thr"],
    )
    verdict = grouped.verify_grouped(p, q, draft, given["uniforms"], groups)
    members = torch.zeros_like(q, dtype=torch.int64).scatter_add(-1, groups.tokens, groups.kept.long())
    return named(verdict) | {"cluster": members}


def grouped_acceptance_rate(case: Case, check: Check) -> dict[str, Tensor]:
    q = check.inputs["draft_probs"]
    p = check.inputs["target_probs"][:, : q.shape[1]]
    return {"alpha": grouped.grouped_acceptance_rate(p, q, check.inputs["clusters"])}


CALLS = {"gsd_verify": gsd_verify, "grouped_acceptance_rate": grouped_acceptance_rate}
