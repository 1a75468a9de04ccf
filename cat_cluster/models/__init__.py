"""Base models: their files, noise schedule, samplers, image generation, and the embedded Pocket-SD."""
