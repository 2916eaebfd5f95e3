# `make demo` and `make test` set up everything they need in .venv on a machine that has Python 3.11, pip and make.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo run test drills bench check fix clean

demo: .venv/run.stamp  ## see it work: two files, every row counted, an answer
	@$(BIN)/python daemon.py demo

run: .venv/run.stamp  ## watch inbox/ of this folder
	@$(BIN)/python daemon.py run

test: check  ## the same, and all tests with the real daemon and the real tiny model
	$(BIN)/python -m pytest -n 3 --dist loadscope tests/training tests/acceptance tests/drills

drills: .venv/drills.stamp  ## try to break the promises, in full, from where it was cut off: tests/drills/README.md
	LONGRUN_DRILLS=full $(BIN)/python -m pytest -n 2 --dist worksteal -o timeout=7200 tests/drills
	$(BIN)/python -m tests.drills.planted

check: .venv/dev.stamp  ## lint, types, floors, and the unit tests with their coverage
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2 tests/unit --cov --cov-report=term:skip-covered

fix: .venv/dev.stamp  ## let the tools mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/bench.stamp  ## rows others lose, and what everything costs: bench/RESULTS.md; hours, 20 GB
	$(BIN)/python -m bench.rows_lost
	$(BIN)/python -m bench.daemon_tax
	$(BIN)/python -m bench.latency
	$(BIN)/python -m bench.idle
	$(BIN)/python -m bench.big_files
	$(BIN)/python -m bench.throughput
	$(BIN)/python -m bench.checkpoints
	$(BIN)/python -m bench.growth
	$(BIN)/python -m bench.backup

# constraints.txt holds the tested versions; pyproject.toml the ranges that are meant to work.
.venv/run.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Longrun needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	@echo "setting up .venv; the packages take some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tensorboard]'
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.venv/bench.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

.venv/drills.stamp: .venv/dev.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[drills]'
	@touch $@

clean:  ## forget the virtual environment, caches, and how far the drills came
	rm -rf .venv .drills .mypy_cache .pytest_cache .ruff_cache .coverage* *.egg-info
