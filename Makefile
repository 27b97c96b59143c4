# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Another release, or its wheel, of auto_LiRPA; with another VENV, since what is installed stays.
LIRPA ?= auto_LiRPA==0.3
# Of the tests, of one torch thread each (tests/conftest.py).
WORKERS ?= -n auto --dist worksteal

.PHONY: setup demo test test-slow docs mutations bench-sets bench-certify bench-third-party bench-training reproduce roots lint clean

setup: $(READY)

$(READY): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps $(LIRPA)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(READY)

demo: $(READY)
	$(BIN)/cure demo --out out/demo

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" $(WORKERS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(WORKERS)

# The pages of docs/ as a site in out/docs; a warning is an error.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --requirement docs/requirements.txt
	$(BIN)/python -m sphinx -W --keep-going -q docs out/docs

# Faults put into the package one at a time, each of which a fast test must notice; ONLY=words of their names.
mutations: $(READY)
	$(BIN)/python tests/mutations.py $(ONLY)

# Figures of the sets; DATA=folder in torchvision's layout for full MNIST and CIFAR-10.
bench-sets: $(READY)
	$(BIN)/python benchmarks/bench_sets.py $(if $(DATA),--data $(DATA))

# Certified counts and times beside plain auto_LiRPA loops, and sets that need splitting; writes benchmarks/results.
bench-certify: $(READY)
	$(BIN)/python benchmarks/bench_certify.py coupled --record $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/bench_certify.py loop --record $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/bench_splitting.py --record $(if $(DATA),--data $(DATA))

# Nets of other papers beside their published figures; NETS=folder with nets.json, BESIDE=another verifier's YAML.
bench-third-party: $(READY)
	$(BIN)/python benchmarks/bench_third_party.py --nets $(NETS) --record $(if $(DATA),--data $(DATA)) \
	  $(if $(BESIDE),--beside $(BESIDE))

# A training step over its floor; what training carries over to unseen sets.
bench-training: $(READY)
	$(BIN)/python benchmarks/bench_training.py --record
	$(BIN)/python benchmarks/bench_generalization.py slice linf=slice/linf universal=slice/universal finetune=slice/universal_finetune --record
	$(BIN)/python benchmarks/bench_generalization.py slice_unseen linf=slice/linf finetune=slice/universal_finetune --record

# The methods of the small settings at equal radii, with ablations; resumes. DATA=folder with MNIST and CIFAR-10.
REPRODUCE = $(BIN)/python benchmarks/reproduce.py $(if $(DATA),--data $(DATA))
reproduce: $(READY)
	$(REPRODUCE) small_mnist_small
	$(REPRODUCE) small_mnist_large
	$(REPRODUCE) small_mnist_small --methods scratch_clean union_finetune
	$(REPRODUCE) small_mnist_large --methods union_finetune
	$(REPRODUCE) small_mnist_small --seeds 0 \
	  --methods ba_only gp_only gp_single plain_sum l2_attack_only l2_box l2_single_box gp_annealing l2_larger
	$(REPRODUCE) small_cifar_small
	$(REPRODUCE) small_cifar_small --methods l2_single_box union_finetune universal
	$(REPRODUCE) small_cifar_large --seeds 0
	$(REPRODUCE) small_tinyimagenet --methods linf scratch union --seeds 0

# The three VNN-COMP benchmark roots: SEED=number; drawn, packed into out/roots, and looked at as the platform would.
roots: $(READY)
	for root in cure_multinorm cure_geometric cure_patch; do \
	  $(BIN)/python benchmarks/$$root/generate_properties.py $(or $(SEED),1) && \
	  rm -rf out/roots/$$root && \
	  $(BIN)/cure bench pack benchmarks/$$root out/roots/$$root && \
	  $(BIN)/cure bench check out/roots/$$root || exit 1; \
	done

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out .mypy_cache .ruff_cache .pytest_cache
