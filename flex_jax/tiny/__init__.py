"""The embedded model and task set: small enough to ship, real enough to learn from. tools/ has what made them."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
TASKS = Path(__file__).parent / "tasks.jsonl.gz"
