"""What a training step and a pack cost."""
