"""What workers, ZeRO, Ray, checkpoints and batches cost and gain."""

PARTS = ("steps", "changes", "checkpoints", "sharding", "batch")
