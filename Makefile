PYTHON ?= python3
VENV ?= .venv

.PHONY: quickstart test clean

# What is compiled is kept, so that the second time starts faster.
quickstart: export JAX_COMPILATION_CACHE_DIR ?= $(abspath $(VENV))/compiled
quickstart: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
quickstart: $(VENV)/.installed
	$(VENV)/bin/python -m flex_jax.main --config configs/quickstart.py --workdir runs/quickstart

test: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -q

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# In its other mode the package is hidden from a program that runs in the folder of the clone, which has its name.
# The stamps keep a second call from installing again; a changed requirement makes them old.
$(VENV)/.installed: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -e . --config-settings editable_mode=compat
	touch $@

$(VENV)/.installed-dev: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -e ".[dev]" --config-settings editable_mode=compat
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
