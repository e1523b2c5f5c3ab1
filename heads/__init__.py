"""From hidden state to token."""
