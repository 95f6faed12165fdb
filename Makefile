# Everything happens in .venv, which the first target that needs it creates: no activation, nothing outside this folder.
# Needs python3 (with venv) and a C++ compiler; cmake and ninja come from pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.puna-installed

# The tests' own threads are few because two processes run them.
PYTEST_ARGS ?= -n 2

# What `make bench` compares with, in an environment of its own; BENCH_ARGS are options of benchmarks/cpu_peers.py.
PEERS := .venv-peers
BENCH_ARGS ?=
LLAMA_SERVER := $(PEERS)/llama.cpp/bin/llama-server

# Where results of a GPU go.
GPU_OUT ?= gpu_results

.PHONY: demo test test-clients test-gpu sanitize lint format bench bench-gpu bench-server clean

demo: $(INSTALLED)
	$(BIN)/puna generate --model demo --echo --seed 1 --stats "Once upon a time"

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore tests/clients $(PYTEST_ARGS)

# The server with the clients that people have, by fuzzing, and its page in Chromium (apt-get install chromium).
test-clients: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -c constraints-clients.txt -r tests/clients/requirements.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/clients

# The kernels for GPUs, on the GPU that is here, with PYTHON as it is: torch, triton and pytest must be installed, not puna.
test-gpu:
	PYTHON=$(PYTHON) scripts/gpu_run.sh $(GPU_OUT) test

# The kernels' tests under AddressSanitizer and UBSan, the thread pool under ThreadSanitizer.
sanitize: $(INSTALLED)
	scripts/sanitize.sh

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Takes half an hour, and means something only where nothing else runs. Writes docs/cpu_peers.md and its plot.
bench: $(INSTALLED) $(PEERS)/.installed
	$(BIN)/python benchmarks/cpu_peers.py --peers-python $(PEERS)/bin/python $(BENCH_ARGS)

# Three quarters of an hour on an H200, on which nothing else should run. Parts can be run one by one: see scripts/gpu_run.sh.
bench-gpu:
	PYTHON=$(PYTHON) scripts/gpu_run.sh $(GPU_OUT) limits trace offline-1 offline-2 offline-3 rest beside

# A quarter of an hour, where nothing else runs; BENCH_ARGS are options of benchmarks/server_peers.py.
bench-server: $(INSTALLED) $(LLAMA_SERVER)
	$(BIN)/python benchmarks/server_peers.py --llama-server $(LLAMA_SERVER) --peers-python $(PEERS)/bin/python $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(PEERS) build .mypy_cache .pytest_cache .ruff_cache .hypothesis src/puna/_kernels*.so
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# An editable install: Python files are used where they lie, so only these files make it out of date.
# The build tools come first and the package is built with them (no build isolation): the exact versions then hold for
# the build too, and build/ keeps working from one build to the next. Every pip line carries the constraints; without
# them pip would choose the newest torch.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@echo "Setting up $(VENV); the first time this downloads PyTorch and takes a minute or more."
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt scikit-build-core nanobind cmake ninja
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

# llama.cpp is compiled here, so that it uses what this processor has; without the parts that only its programs need.
$(PEERS)/.installed: benchmarks/peers_requirements.txt
	@echo "Setting up $(PEERS); this compiles llama.cpp, which takes several minutes."
	$(PYTHON) -m venv $(PEERS)
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" $(PEERS)/bin/python -m pip install --quiet \
		--no-binary llama-cpp-python -r benchmarks/peers_requirements.txt
	@touch $@

# llama.cpp's own server, of the sources in that release of llama-cpp-python; without its page, which would be downloaded.
$(LLAMA_SERVER): $(PEERS)/.installed
	rm -rf $(PEERS)/sources && mkdir $(PEERS)/sources
	$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary llama-cpp-python \
		--dest $(PEERS)/sources $$(grep llama-cpp-python benchmarks/peers_requirements.txt)
	tar xzf $(PEERS)/sources/*.tar.gz -C $(PEERS)/sources --strip-components 1
	$(BIN)/cmake -S $(PEERS)/sources/vendor/llama.cpp -B $(PEERS)/llama.cpp -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
		-DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_COMMON=ON -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \
		-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF
	$(BIN)/cmake --build $(PEERS)/llama.cpp --target llama-server --parallel $$(nproc)
