# A fresh machine needs Python >= 3.11 and two commands: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers

.PHONY: demo test mutants mutants-sample test-slow test-sample test-commands test-lowest test-browser test-mixins check bench bench-gpu claims gpu-plan clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Libraries that some tests compare with; without them those tests are skipped.
$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[dev,peers]' || echo "peers are not installed: tests against them are skipped"
	touch $@

demo: $(INSTALLED)
	$(BIN)/hf-dpssl demo --output_dir outputs/demo

# Two files at a time: the tests use one thread each.
test: $(PEERS)
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

test-slow: $(PEERS)
	$(BIN)/python -m pytest -q -m "slow or extended" --numprocesses 2 --dist loadfile

# Of those that take seconds another sample after every commit.
test-sample: $(PEERS)
	$(BIN)/python -m pytest -q -m extended --numprocesses 2 --sample 16 --sample_seed $$(git rev-list --count HEAD || echo 0)

# The commands and snippets of README.md and training/README.md, one after the other in a fresh folder: minutes.
test-commands: $(PEERS)
	$(BIN)/python -m pytest -q -m slow tests/training/test_demo.py -k commands_and_snippets

# Planted defects, each of which the tests named for it must notice; the sample is another one after every commit.
mutants: $(PEERS)
	$(BIN)/python tests/mutants/run.py

mutants-sample: $(PEERS)
	$(BIN)/python tests/mutants/run.py --sample 8 --seed $$(git rev-list --count HEAD || echo 0)

# The Spaces in a real Chromium: CHROMIUM_PATH, or one on PATH (apt-get install -y chromium); skipped without.
test-browser: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[dev,browser]'
	$(BIN)/python -m pytest -q -m browser tests/browser

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests/test_layout.py

# Other libraries' own checks on our classes, where their sources are given by TRANSFORMERS_SOURCE (its source
# distribution, of the installed version), DIFFUSERS_SOURCE and EVALUATE_SOURCE (checkouts); skipped without, with
# pytest's exit code 5. One process each: all call their tests `tests`. Last our tests with peft and torchao.
test-mixins: $(PEERS)
	$(BIN)/python -m pip install --quiet --editable '.[mixins]'
	for checks in tests/mixins/test_*.py "tests/models/test_library_conventions.py tests/models/test_storage_precision.py"; do \
		$(BIN)/python -m pytest -q -rxX -o addopts= $$checks || [ $$? -eq 5 ] || exit 1; \
	done

# The lowest versions that pyproject.toml allows of what it names, in an environment of their own.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip compile --quiet --resolution lowest-direct pyproject.toml > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/lowest.txt --editable '.[dev]'
	.venv-lowest/bin/python -m pytest -q

bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python tests/benchmarks/contrastive.py
	$(BIN)/python tests/benchmarks/autoencoder.py
	$(BIN)/python tests/benchmarks/augmentation.py
	$(BIN)/python tests/benchmarks/neighbours.py
	$(BIN)/python tests/benchmarks/frechet.py
	$(BIN)/python tests/benchmarks/token_guidance.py
	$(BIN)/python tests/benchmarks/dit.py
	$(BIN)/python tests/benchmarks/drifting.py
	$(BIN)/python tests/benchmarks/compiled.py
	$(BIN)/python tests/benchmarks/waits.py
	$(BIN)/python tests/benchmarks/front_door.py

# All that needs a GPU, in one run for 15 minutes of one; GPU_ARGS="--scale 0.001" tries it on a CPU.
bench-gpu: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python tests/benchmarks/gpu.py $(GPU_ARGS)

# The claims at scale quick: 4.7 hours of one core for claims 1 to 20, one more for 21 and 22; a killed run goes on.
claims: $(INSTALLED)
	$(BIN)/hf-dpssl reproduce all --scale quick --output_dir outputs/claims

# The claims that fit into 15 minutes of one GPU: tried at a thousandth on a CPU; PLAN_ARGS= runs them on a GPU.
PLAN_ARGS ?= --size 0.001
gpu-plan: $(INSTALLED)
	$(BIN)/python training/evidence/gpu_plan.py $(PLAN_ARGS)

clean:
	rm -rf $(VENV) .venv-lowest outputs
