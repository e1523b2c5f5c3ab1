"""Decoding: guidance, token filters, the loop."""
