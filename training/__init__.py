"""Training: losses, networks that only training needs, weight averages, the two loops, checkpoints, run folders."""
