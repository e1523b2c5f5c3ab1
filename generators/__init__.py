"""Orders of prediction."""
