"""The embedded model and task set: small enough to ship, real enough to learn from."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
