"""Calls of the `nar-video` cases: those of `nar`."""

from tests.adapters.nar import CALLS

__all__ = ["CALLS"]
