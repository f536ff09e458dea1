"""Selects pretrained experts for each client, and grafts them into its personal slots."""

from flex_jax.grafting.reconstruction import reconstruction_losses

__all__ = ["reconstruction_losses"]
