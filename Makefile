# Two commands: `make demo` shows the whole path, `make test` runs what CI runs. Both set up `.venv` first.
PYTHON ?= python3
BIN := .venv/bin
S3 := .venv/s3
THREADS := PATH="$$PATH:$(CURDIR)/$(S3)/bin" OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0

.PHONY: demo test test-long parity lint clean

demo: .venv/.ready
	$(BIN)/python examples/demo.py

test: .venv/.ready lint
	$(THREADS) $(BIN)/pytest -n 2 --dist loadfile -q

test-long: .venv/.ready
	$(THREADS) $(BIN)/pytest -n 2 --dist loadfile -q -m "long or not long"

# Compares with upstream code in checkouts below CHECKOUTS; docs/parity.md names them and keeps the outcome.
parity: .venv/.ready
	$(if $(CHECKOUTS),,$(error make parity CHECKOUTS=DIR; docs/parity.md says which checkouts DIR holds))
	$(THREADS) $(BIN)/python tests/parity/run_parity.py "$(CHECKOUTS)"

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
	rm -rf .venv demo build *.egg-info
