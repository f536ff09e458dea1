"""Choosing the pretrained experts of each client and grafting them into its personal slots."""

from flex_jax.grafting.reconstruction import reconstruction_losses

__all__ = ["reconstruction_losses"]
