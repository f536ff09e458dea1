PYTHON ?= python3
VENV ?= .venv

.PHONY: quickstart test torture check clean

# Caches compiled programs, so that a second run starts faster.
quickstart: export JAX_COMPILATION_CACHE_DIR ?= $(abspath $(VENV))/compiled
quickstart: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
quickstart: $(VENV)/.installed
	$(VENV)/bin/python -m flex_jax.main --config configs/quickstart.py --workdir runs/quickstart

# pyproject.toml says what is measured and how much must be covered. `make test COVERAGE=` does not measure, which saves
# a fifth of the time on Python 3.11: it lacks the fast tracer.
test: COVERAGE ?= --cov --cov-report=term:skip-covered
test: check
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -q $(COVERAGE)

# Kills, full disks, flipped bits, hostile input: a table of what became of them, in half an hour on two cores.
torture: $(VENV)/.installed-dev
	$(VENV)/bin/python -m tests.torture

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf $(VENV) runs build dist *.egg-info .coverage .coverage.* .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# compat: in the default editable mode, Python started in the parent folder of a clone imports the clone instead of the
# package, because both are called flex_jax. The stamps: a second call installs again only if the requirements changed.
$(VENV)/.installed: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -e . --config-settings editable_mode=compat
	touch $@

$(VENV)/.installed-dev: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -e ".[dev]" --config-settings editable_mode=compat
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
