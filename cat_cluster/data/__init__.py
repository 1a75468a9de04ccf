"""Training data: photos and captions, concepts, cached latents, and what each row of a step draws."""
