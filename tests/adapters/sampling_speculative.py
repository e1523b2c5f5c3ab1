"""Calls of the `sampling-speculative` cases: testing a chain of drafts, and what it brings."""

from torch import Tensor

from sampling.speculative import acceptance
from sampling.speculative.acceptance import Verdict
from tests.goldens import Case, Check


def named(verdict: Verdict) -> dict[str, Tensor]:
    return {"accept_prob": verdict.accept_prob, "num_accepted": verdict.count, "next_dist": verdict.law}


def speculative_verify(case: Case, check: Check) -> dict[str, Tensor]:
    given = check.inputs
    weights = given.get("weights", 1.0)
    return named(
        acceptance.verify_chain(
            given["target_probs"], given["draft_probs"], given["draft_tokens"], given["uniforms"], weights
        )
    )


def acceptance_rate(case: Case, check: Check) -> dict[str, Tensor]:
    p, q = check.inputs["target_probs"], check.inputs["draft_probs"]
    return {"alpha": acceptance.acceptance_rate(p[:, : q.shape[1]], q)}


def expected_tokens(case: Case, check: Check) -> dict[str, Tensor]:
    return {"tokens": acceptance.expected_tokens(check.inputs["alpha"], check.params["draft_length"])}


def expected_speedup(case: Case, check: Check) -> dict[str, Tensor]:
    n, cost = check.params["draft_length"], check.params["cost_ratio"]
    return {"speedup": acceptance.expected_speedup(check.inputs["alpha"], n, cost)}


def greedy_verify(case: Case, check: Check) -> dict[str, Tensor]:
    count, token = acceptance.verify_greedy(check.inputs["target_logits"], check.inputs["draft_tokens"])
    return {"num_accepted": count, "next_token": token}


def one_step_law(case: Case, check: Check) -> dict[str, Tensor]:
    q = check.inputs["draft_probs"]
    p = check.inputs["target_probs"][:, : q.shape[1]]
    law = acceptance.weighted_law(p, q, check.inputs["weights"])
    return {"law": law, "tv": acceptance.total_variation(law, p)}


CALLS = {
    "speculative_verify": speculative_verify,
    "acceptance_rate": acceptance_rate,
    "expected_tokens": expected_tokens,
    "expected_speedup": expected_speedup,
    "greedy_verify": greedy_verify,
    "weighted_verify": speculative_verify,
    "one_step_law": one_step_law,
}
