# One command each: make install | demo | test | test-oldest | test-newest | lock | test-engines | test-all | test-avx2 | lint | fix | docs | pages | bench | cuda-bounds | matrix | figures | compare | census | export-check. What they need is installed into .venv by the first call;
# stamp files there remember it. PYTHON chooses the interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
# The versions that everything below installs: one file for Python 3.10 to 3.13 on x86-64 and aarch64. `make lock` renews it.
# Other versions: make test PIP_CONSTRAINT=FILE; the newest ones: PIP_CONSTRAINT=
LOCK := constraints.txt
export PIP_CONSTRAINT ?= $(abspath $(LOCK))
LLAMA := .llama
ENGINES := .engines
PY := $(VENV)/bin/python
# pip shows what it downloads and installs. Python compiles what is imported; all 18,000 files take 20 seconds.
PIP := $(PY) -m pip install --disable-pip-version-check --no-compile
# Built against the PyTorch in .venv, which therefore comes first; plugins are packages of their own.
BUILD := $(PIP) --no-build-isolation
# What is installed along with peftcore. A later call of pip builds the metadata again: CI asks for everything at once.
EXTRAS := train
PLUGINS := $(sort $(patsubst %/,%,$(dir $(wildcard plugins/*/pyproject.toml))))
PACKAGING := pyproject.toml $(LOCK) setup.py csrc/toolchain.py $(PLUGINS:%=%/pyproject.toml)
CXX_FILES := $(sort $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'))
CSRC := $(filter csrc/%,$(CXX_FILES))

# decode_llama.py is a part of decode.py, for another Python, and run_all.py runs the others; of those left out the rest
# need arguments, card.py a card, too.
BENCHMARKS = $(filter-out $(patsubst %,benchmarks/%.py,card decode_llama journeys run_all),$(shell grep -l __main__ benchmarks/*.py))

.PHONY: install demo test test-oldest test-newest lock test-engines test-all test-avx2 lint fix docs pages bench cuda-bounds matrix figures compare census export-check clean

install: $(VENV)/train.stamp
	@echo "installed into $(VENV). Go on with: . $(VENV)/bin/activate"

demo: $(VENV)/train.stamp
	$(PY) benchmarks/demo/run.py

# Two workers of one thread: tiny matrices gain nothing by more, and threads that wait for one another cost much. Files keep
# their order, of which the longest are the first. Bytecode is written, since tests start Python often.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/dev.stamp
	$(PYTEST) --durations 40 --durations-min 5

# The suite in a clone of its own, with the oldest versions that pyproject.toml allows, and with the newest on the index.
test-oldest: build/oldest.txt
	rm -rf build/oldest && git clone --quiet . build/oldest
	$(MAKE) -C build/oldest test PIP_CONSTRAINT=$(abspath build/oldest.txt)

test-newest:
	rm -rf build/newest && git clone --quiet . build/newest
	$(MAKE) -C build/newest test PIP_CONSTRAINT=

# uv resolves for all Pythons and processors at once. PyTorch brings its own pins for CUDA, which a CPU build has not;
# triton is the exception, whose interpreter runs kernels in tests.
UV := --quiet --no-annotate --no-header --no-emit-index-url
TORCH := 2.13.0
lock: $(VENV)/uv.stamp
	(echo "torch==$(TORCH)"; $(PY) plugins/requirements.py) > build/requirements.in
	$(VENV)/bin/uv pip compile $(UV) --universal --python-version 3.10 --upgrade build/requirements.in \
		| grep -vE '^(nvidia-|cuda-)' > build/$(LOCK)
	(echo "# Renewed by: make lock"; cat build/$(LOCK)) > $(LOCK)

build/oldest.txt: pyproject.toml $(PLUGINS:%=%/pyproject.toml) | $(VENV)/uv.stamp
	$(PY) plugins/requirements.py > build/requirements.in
	$(VENV)/bin/uv pip compile $(UV) --resolution lowest-direct --python $$($(PYTHON) -c "import sys; print(sys.executable)") \
		build/requirements.in | grep -vE '^(nvidia-|cuda-)' > $@.part
	mv $@.part $@

# Without the folders that try all levels themselves, and those that compute nothing with kernels.
PORTABLE = plugins $(filter-out $(addprefix tests/,card/ csrc/ emulator/ fuzz/ ops/ typed/ census/ estimating/ model/ support/ __pycache__/),\
	$(wildcard tests/*/))

# And what takes long: each family of models and every check, all cases of the corpora, sanitizers, a part of the census;
# then, whether they passed or not, once more with the kernels of plain C++, which tests/ops tries in both. An hour on two
# cores.
test-all: $(VENV)/dev.stamp
	PEFTCORE_TESTS=all $(PYTEST) --durations 40 --durations-min 20; first=$$?; \
	PEFTCORE_CPU_LEVEL=portable $(PYTEST) $(PORTABLE) && exit $$first

# Tests of kernels and dtypes, as on a processor with AVX2 and nothing above: the variables limit PyTorch, oneDNN and
# peftcore's kernels, in this run alone. Two minutes on two cores.
# Inductor keeps what it compiled for a user, whatever instructions were allowed: these have a cache of their own.
AVX2 := TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/inductor-avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 PEFTCORE_CPU_LEVEL=avx2
AVX2_TESTS := \
	tests/estimating/test_mixed_precision.py \
	tests/training/integrations/test_reference_model.py \
	tests/quantization \
	tests/ops/test_linear_4bit.py tests/ops/test_dense_linear.py tests/ops/test_swiglu.py \
	plugins/peftcore-lora/tests/test_experts.py plugins/peftcore-lora/tests/test_lora.py \
	plugins/peftcore-dora/tests/test_dora.py \
	plugins/peftcore-qlora/tests

test-avx2: $(VENV)/dev.stamp
	$(AVX2) $(PYTEST) $(AVX2_TESTS)

# Adapters under DeepSpeed, Lightning and Ray Train, on processes of a CPU; conversations by mistral-common, which pins an older
# numpy. They have an environment of their own, over .venv;
# DeepSpeed compiles a part of itself at the first call.
test-engines: $(ENGINES)/engines.stamp
	OMP_NUM_THREADS=1 $(ENGINES)/bin/python -m pytest -p no:xdist tests/distributed/test_deepspeed.py \
		tests/distributed/test_engines.py tests/test_examples.py plugins/peftcore-cli/tests/tasks/test_mistral_chats.py -k "deepspeed or engine or mistral"

# mypy reads PyTorch once, 20 seconds, and then takes a second: its cache is .mypy_cache.
lint: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff check --preview --select DOC102,DOC202,DOC403 peftcore plugins
	$(VENV)/bin/codespell
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

fix: $(VENV)/dev.stamp
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

# The site into build/docs: links, names and options that lead nowhere are errors.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# What the code of the pages prints, under it: the commands run on SmolLM2-135M, which the demo's package brings. One page:
# make pages PAGES=docs/quickstart.md
pages: $(VENV)/train.stamp
	$(PY) benchmarks/demo/pages.py $(PAGES)

# The table of docs/method-support.md, from conformance runs; a test fails when it is stale.
matrix: $(VENV)/dev.stamp
	cd tests && OMP_NUM_THREADS=1 ../$(PY) -m support.matrix

# docs/figures.md, a page of all figures, and docs/performance.png from docs/figures.csv; a test fails when the page is stale.
figures: $(VENV)/dev.stamp
	cd tests && ../$(PY) -m support.figures

# Every method on the demo's two tasks, PEFT beside it, docs/comparison.md: hours on two cores, and it goes on where it was
# stopped. Much less: make compare COMPARE=--reduced
compare: $(VENV)/dev.stamp
	$(PY) benchmarks/demo/compare.py $(COMPARE)

# Every model class of transformers under every method: an hour on one core. It goes on where it was stopped; the page is
# docs/census.md, one class: make census CENSUS="--only '^BertModel$$' --verbose". To begin anew: CENSUS=--fresh
census: $(VENV)/dev.stamp
	cd tests && OMP_NUM_THREADS=1 ../$(PY) -W ignore -m census --write ../docs/census.md $(CENSUS)

# What `peftcore export` writes against llama.cpp, which is built from its source in five minutes on two cores.
export-check: $(VENV)/train.stamp $(LLAMA)/llama.stamp
	$(PY) benchmarks/export/families.py --llama $(LLAMA)/bin/python
	$(PY) benchmarks/export/check.py --llama $(LLAMA)/bin/python
	$(PY) benchmarks/export/quickstart.py --llama $(LLAMA)/bin/python

# Each benchmark once, the shortest first; benchmarks/run_all.py has the seconds that each takes. One that fails does not keep
# the others from running, and make fails at the end. What was printed and a chart of all ratios are in build/bench.
# One of them: make bench BENCHMARKS=benchmarks/lora.py. Where a run with the defaults takes minutes (all models, sizes or
# methods), these are some of its rows; all of them: make bench BENCHMARKS=benchmarks/step.py BENCH_step=
BENCH_decode = --shapes smollm2-135m
BENCH_dora = --seconds 5
BENCH_engine = --seconds 20
BENCH_estimate = --count 4
BENCH_layer = --seconds 3
BENCH_linear_cross_entropy = --shape SmolLM2-135M --seconds 5
BENCH_many_adapters = --adapters 300
BENCH_methods = --quick --model smollm2 --seconds 0.5
BENCH_methods_layers = --seconds 0.5
BENCH_processors = --rows 64 256
BENCH_qlora = --steps 20
BENCH_qlora_large = --layers 2
BENCH_quality_4bit = --tokens 2048
BENCH_serve = --adapters 32 --tokens 16
BENCH_step = --short --layers 2 --rows 4x128 --rounds 1
BENCH_suggest = --memory 24
bench: $(VENV)/dev.stamp
	@$(PY) benchmarks/run_all.py $(foreach file,$(BENCHMARKS),"$(strip $(file) $(BENCH_$(basename $(notdir $(file)))))")

# What bounds each CUDA kernel on two cards, from what nvcc makes of it: no card is needed, and 3 minutes. Some of the
# kernels: make cuda-bounds KERNELS=dequantize
cuda-bounds: $(VENV)/nvdisasm.stamp
	$(PY) benchmarks/cuda_bounds/run.py $(KERNELS)

clean:
	rm -rf $(VENV) $(LLAMA) $(ENGINES) .demo build dist *.egg-info plugins/*/*.egg-info peftcore/_C*.so peftcore/_build.json

$(VENV)/torch.stamp: $(LOCK)
	@echo "1 of 3: installing PyTorch and the build tools into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "torch>=2.9" numpy "setuptools>=77" "pybind11>=2.13" "ninja>=1.11"
	@touch $@

$(VENV)/uv.stamp: | $(VENV)/dev.stamp
	$(PIP) uv
	@mkdir -p build
	@touch $@

$(VENV)/nvdisasm.stamp: | $(VENV)/torch.stamp
	$(PIP) nvidia-cuda-nvdisasm
	@touch $@

$(LLAMA)/llama.stamp:
	$(PYTHON) -m venv $(LLAMA)
	@echo "building llama.cpp into $(LLAMA)"
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF $$CMAKE_ARGS" $(LLAMA)/bin/python -m pip install \
		--disable-pip-version-check --quiet --no-binary llama-cpp-python llama-cpp-python
	@touch $@

$(ENGINES)/engines.stamp: | $(VENV)/dev.stamp
	$(PYTHON) -m venv $(ENGINES)
	$(PY) -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$($(ENGINES)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/over.pth"
	DS_BUILD_OPS=0 PIP_CONSTRAINT= $(ENGINES)/bin/python -m pip install --disable-pip-version-check --no-build-isolation deepspeed lightning 'ray[train]' 'mistral-common[audio]'
	@touch $@

$(VENV)/train.stamp: $(VENV)/torch.stamp $(PACKAGING) $(CSRC)
	@echo "2 of 3: building the extension"
	$(PY) setup.py --quiet build_ext --inplace
	@echo "3 of 3: installing peftcore, what training needs, and $(words $(PLUGINS)) packages of plugins/"
	@$(PY) plugins/install.py ".[$(EXTRAS)]" $(PLUGINS)
	@touch $@

$(VENV)/docs.stamp: $(VENV)/train.stamp
	$(if $(findstring docs,$(EXTRAS)),,$(BUILD) -e ".[docs]")
	@touch $@

$(VENV)/dev.stamp: $(VENV)/train.stamp
	$(if $(findstring dev,$(EXTRAS)),,@echo "installing what tests, linters and benchmarks need"; $(BUILD) -e ".[dev]")
	@touch $@
