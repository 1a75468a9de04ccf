"""What a training service gains: how soon it begins and publishes, and a stream of concepts beside batch jobs."""

PARTS = ("latency", "defaults", "stream")
