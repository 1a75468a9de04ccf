"""How Pocket-XL's weights are made and measured. Nothing that runs uses it: an installation may leave it out."""
