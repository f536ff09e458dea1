"""Mixture-of-experts decoders as pure functions of two collections: frozen `params` and trained `adapters`."""
