"""Usage numbers in closed form."""

from math import log

import pytest
import torch
from torch.testing import assert_close

from tokenizers_vis.quantizers.usage import code_counts, usage_metrics


def test_counts_add_up_over_batches() -> None:
    ids = torch.tensor([[0, 3, 3], [1, 3, 0]])
    assert code_counts(ids, 5).tolist() == [2, 1, 0, 3, 0]
    assert torch.equal(code_counts(ids[:1], 5) + code_counts(ids[1:], 5), code_counts(ids, 5))


@pytest.mark.parametrize(
    ("counts", "usage", "perplexity"),
    [([7] * 8, 1.0, 8.0), ([0, 5, 0, 0], 0.25, 1.0), ([2, 2, 0, 0], 0.5, 2.0), ([2, 1, 1, 0], 0.75, 2 * 2**0.5)],
)
def test_metrics_in_closed_form(counts: list[int], usage: float, perplexity: float) -> None:
    metrics = usage_metrics(torch.tensor(counts))
    assert_close(metrics["usage"], torch.tensor(usage))
    assert_close(metrics["perplexity"], torch.tensor(perplexity))
    assert_close(metrics["kl_uniform"], torch.tensor(log(len(counts) / perplexity)))
