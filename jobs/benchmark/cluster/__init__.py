"""What workers, ZeRO, Ray, checkpoints and batches cost and gain."""

PARTS = ("steps", "checkpoints", "sharding", "batch")
