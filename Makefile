# Each target sets up what it needs, once: .venv (the product and its tools) and .venv-engine (vLLM for CPUs).
#   make serve ADDRESS=127.0.0.1:9000                     another address
#   make serve VLLM_DROPIN_ENGINE_PYTHON=/path/python     an engine of your own: .venv-engine is not built
#   make fuzz EXAMPLES=20000 SECONDS=600 SEED=7           more of it, or the same again
#   make soak ARGS='--minutes 60 --seed 7'                longer, or the same faults again
#   make test ARGS='-k predict -x'                        options for what the target runs
#   make PYTHON=/path/python3.12 ...                      the interpreter that the environments are built with

ADDRESS ?= 127.0.0.1:8080
ARGS ?=
# Asked only when pip doesn't find torch+cpu by itself. Empty: never.
export TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export PYTHON

BIN := .venv/bin
DEV := .venv/.complete
ifdef VLLM_DROPIN_ENGINE_PYTHON
ENGINE :=
else
ENGINE := .venv-engine/.complete
VLLM_DROPIN_ENGINE_PYTHON := $(CURDIR)/.venv-engine/bin/python
endif
export VLLM_DROPIN_ENGINE_PYTHON

.PHONY: help
help:
	@echo 'make serve           serve examples/smollm2 on http://$(ADDRESS)'
	@echo 'make test            all tests but the slow ones, the real engine included (12 minutes on 2 cores)'
	@echo 'make test-fast       the tests that need no engine'
	@echo 'make test-slow       the tests that are left out of "make test"'
	@echo 'make faults          the tests behind docs/reliability.md, whose table it measures (about 20 minutes)'
	@echo 'make fuzz            random inputs by the thousand: requests, tables, files, flags (about 10 minutes)'
	@echo 'make soak            load and faults for 20 minutes: what is lost, what grows, what is left over; a report'
	@echo 'make audit           known vulnerabilities of what the lock files pin (asks a database on the internet)'
	@echo 'make lint            ruff, mypy, import-linter'
	@echo 'make check-contract  the contract suite against DRUM and against this, side by side'
	@echo 'make bench           the numbers of docs/benchmarks.md'
	@echo 'make environment     write environment/ anew, the image context that is checked in'
	@echo 'make image-test      build and boot the image (root, buildah, debootstrap, 40 GB, 10 minutes)'
	@echo 'make lock            write requirements/*.lock anew (needs uv)'
	@echo 'make clean           remove the environments, caches and the unpacked example'

.PHONY: serve
serve: $(DEV) $(ENGINE)
	@echo 'serving examples/smollm2 on http://$(ADDRESS): loading takes about a minute, Ctrl-C stops'
	@$(BIN)/vllm-dropin serve examples/smollm2 --address $(ADDRESS) $(ARGS)

.PHONY: test
test: $(DEV) $(ENGINE)
	$(BIN)/pytest -m 'not slow' $(ARGS)

.PHONY: test-fast
test-fast: $(DEV)
	$(BIN)/pytest -m 'not slow and not e2e' $(ARGS)

.PHONY: test-slow
test-slow: $(DEV) $(ENGINE)
	$(BIN)/pytest -m slow $(ARGS)

EXAMPLES ?= 2000
SECONDS ?= 60
SEED ?= $(shell date +%s)

.PHONY: fuzz
fuzz: .venv-fuzz/.complete $(ENGINE)
	FUZZ_EXAMPLES=$(EXAMPLES) FUZZ_SECONDS=$(SECONDS) .venv-fuzz/bin/pytest tests/fuzz -m fuzz \
		--hypothesis-seed=$(SEED) $(ARGS)

.PHONY: faults
faults: $(DEV) $(ENGINE)
	@mkdir -p .cache && rm -f .cache/faults.jsonl
	FAULTS_FIGURES=$(CURDIR)/.cache/faults.jsonl $(BIN)/pytest -m faults $(ARGS)
	$(if $(ARGS),,$(BIN)/python -m tests.faults .cache/faults.jsonl)

.PHONY: soak
soak: .venv-soak/.complete $(ENGINE)
	@.venv-soak/bin/python -m soak $(ARGS)

.PHONY: audit
audit: .venv-audit/.complete
	@.venv-audit/bin/python scripts/audit.py $(ARGS)

.PHONY: lint
lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: check-contract
check-contract: $(DEV) $(ENGINE)
	$(BIN)/python scripts/check_contract.py $(ARGS)

.PHONY: bench
bench: $(DEV) $(ENGINE)
	$(BIN)/python -m benchmarks $(ARGS)

.PHONY: environment
environment: $(DEV)
	$(BIN)/vllm-dropin build --output environment

.PHONY: image-test
image-test: $(DEV)
	$(BIN)/python scripts/image_test.py

.PHONY: lock
lock:
	scripts/lock.sh $(ARGS)

.PHONY: clean
clean:
	rm -rf .venv .venv-* .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache dist soak-report examples/*/vllm
	find src tests scripts examples benchmarks soak -name __pycache__ -prune -exec rm -rf {} +

$(DEV): requirements/dev.lock pyproject.toml scripts/venv.sh
	@scripts/venv.sh dev .venv

.venv-fuzz/.complete: requirements/fuzz.lock pyproject.toml scripts/venv.sh
	@scripts/venv.sh fuzz .venv-fuzz

.venv-soak/.complete: requirements/soak.lock pyproject.toml scripts/venv.sh
	@scripts/venv.sh soak .venv-soak

.venv-audit/.complete: requirements/audit.lock scripts/venv.sh
	@scripts/venv.sh audit .venv-audit

$(ENGINE): requirements/cpu.lock requirements/pip-check-accepted.txt scripts/venv.sh
	@scripts/venv.sh engine .venv-engine
