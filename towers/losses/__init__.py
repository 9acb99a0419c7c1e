"""Contrastive losses, and the losses of labeled pairs."""
