"""Speculative decoding: acceptance rules as pure functions, trees of drafts, drafters."""
