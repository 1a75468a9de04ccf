"""cat-cluster: knowledge-preserving personalisation of Stable Diffusion with Contrastive Adapter Training (CAT)."""
