import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, from the environment or beside the repository; its tests skip where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FLEX_JAX_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder (set FLEX_JAX_SHARED_DATA)")
    return folder
