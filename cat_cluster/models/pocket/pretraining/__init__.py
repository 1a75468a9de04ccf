"""How Pocket-SD's weights were made and measured. Nothing that runs uses it: it can be left out of an installation."""
