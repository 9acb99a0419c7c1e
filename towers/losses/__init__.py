"""Contrastive losses, and the losses of labelled pairs."""
