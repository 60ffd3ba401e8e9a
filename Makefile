# Two commands: `make demo` shows the whole path, `make test` runs what CI runs. Both set up `.venv` first.
PYTHON ?= python3
BIN := .venv/bin
S3 := .venv/s3
THREADS := PATH="$$PATH:$(CURDIR)/$(S3)/bin" OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
# A worker that is done takes half of what the other still has: by file, the largest one would decide.
WORKERS := -n 2 --dist worksteal

.PHONY: demo test pytest test-long parity floors lint clean

demo: .venv/.ready
	$(BIN)/python examples/demo.py

# Lint beside the tests: mypy fills the time in which tests wait for processes, sockets and disks.
test: .venv/.ready
	@$(MAKE) --no-print-directory --jobs 2 lint pytest

pytest: .venv/.ready
	$(THREADS) $(BIN)/pytest $(WORKERS) -q

test-long: .venv/.ready
	$(THREADS) $(BIN)/pytest $(WORKERS) -q -m "long or not long"

# Compares with upstream code in checkouts below CHECKOUTS; docs/parity.md names them and keeps the outcome.
parity: .venv/.ready
	$(if $(CHECKOUTS),,$(error make parity CHECKOUTS=DIR; docs/parity.md says which checkouts DIR holds))
	$(THREADS) $(BIN)/python tests/parity/run_parity.py "$(CHECKOUTS)"

# Every declared minimum, and a small set of tests: featurize, train, evaluate, export, read videos and data sets, roll out.
FLOORS := .venv-floors
SMOKE := tests/golden tests/featurize/test_run.py tests/stores/test_format_conformance.py \
	tests/remote/test_every_kind_in_every_place.py tests/sources/test_lerobot_frames.py tests/sources/test_robomimic.py \
	tests/sources/test_replay_buffer.py tests/heads/test_export.py tests/heads/test_evaluate.py \
	tests/rollout/test_policy.py tests/rollout/test_lerobot_writer.py tests/rollout/test_metaworld_env.py \
	tests/cli/test_head_commands.py tests/scale_out/test_clusters.py

floors: $(FLOORS)/.ready
	$(THREADS) $(FLOORS)/bin/python -m pytest -q -W default $(SMOKE)

$(FLOORS)/.ready: pyproject.toml tests/packaging/floors.py
	$(PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/python tests/packaging/floors.py pyproject.toml > $(FLOORS)/floors.txt
	$(FLOORS)/bin/pip install --quiet $$(grep '^torch==' $(FLOORS)/floors.txt)
	$(FLOORS)/bin/pip install --quiet --requirement $(FLOORS)/floors.txt pytest pytest-timeout hypothesis
	$(FLOORS)/bin/pip install --quiet --no-deps --editable .
	@touch $@

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .venv/typing && ln -sfn "$(CURDIR)" .venv/typing/vla
	MYPYPATH=.venv/typing $(BIN)/mypy -p vla.stores -p vla.training -p vla.featurize -p vla.heads -p vla.rollout -p vla.pretrained -p vla.terminal -m vla.cli
	$(BIN)/lint-imports

# An S3 server that is not ours, in an environment of its own: its pins are not those of the project.
# torch first and alone: pip then keeps that build instead of choosing one with gigabytes of CUDA.
# depth-anything-3 last and without its dependencies: it asks for numpy 1 and twenty packages that its network never uses.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt) --constraint constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[sim,dev,dist]'
	$(PYTHON) -m venv $(S3)
	$(S3)/bin/pip install --quiet 'moto[server]==5.2.5'
	@sh examples/install_osmesa.sh
	$(BIN)/pip install --quiet --no-deps $$(grep '^depth-anything-3==' constraints.txt)
	@touch $@

clean:
	rm -rf .venv $(FLOORS) demo build *.egg-info
