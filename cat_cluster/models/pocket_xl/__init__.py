"""Pocket-XL, the small Stable Diffusion XL: its world of named pictures, its concepts and its pretraining."""
