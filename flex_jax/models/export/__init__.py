"""Trained clients as directories that PEFT and transformers load."""
