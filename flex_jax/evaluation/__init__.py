"""Evaluation: what the trained clients answer, and how good it is."""
