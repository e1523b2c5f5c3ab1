"""What every room builds on: attention, positions, norms, noise, the shared values, key maps, the checkpoint reader."""
