"""What the pretraining of both embedded bases shares: the resumable stage, tokenizer, VAE, contrast, noise, results.

Nothing that runs uses it: it can be left out of an installation.
"""
