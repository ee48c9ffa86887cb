# Two commands: `make run` and `make test`. Both set up .venv from requirements.txt first.
PYTHON ?= python3
ENV := .venv
PY := $(ENV)/bin/python
export OMP_NUM_THREADS ?= 1

.PHONY: run test bench lint clean

run: $(ENV)/.ready
	$(PY) fedpurel.py

test: $(ENV)/.ready
	$(PY) -m pytest

bench: $(ENV)/.ready
	$(PY) benchmarks/fedpurel_round.py
	$(PY) benchmarks/fedpurel_claims.py
	$(PY) benchmarks/copsl_speed.py
	$(PY) benchmarks/copsl_claims.py
	$(PY) benchmarks/coaction_claims.py
	$(PY) benchmarks/pro_vpt_epoch.py
	$(PY) benchmarks/pro_vpt_claims.py
	$(PY) benchmarks/pro_vpt_moved.py
	$(PY) benchmarks/elsa_step.py
	$(PY) benchmarks/elsa_claims.py

lint: $(ENV)/.ready
	$(ENV)/bin/ruff check .

$(ENV)/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(ENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:
	rm -rf $(ENV) .pytest_cache .ruff_cache __pycache__ tests/__pycache__
