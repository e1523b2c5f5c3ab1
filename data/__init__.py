"""Pictures by name, their crops, the order they come in, and caches of their tokens. Knows no other room."""
