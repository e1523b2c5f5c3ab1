"""Density and coverage: precision and recall that single outliers do not decide. Features of torch-fidelity."""

from eval.metrics import naeem
from eval.protocol import Protocol

DENSITY_COVERAGE = Protocol(
    name="density-coverage",
    source="Naeem et al. 2020, arXiv:2002.09797",
    metrics=(naeem("inception/tf1", "2048"),),
    count=10_000,
    class_sampling="balanced",
    uint8="round",
    reference="as many real pictures as samples",
)
