# make demo: train, evaluate and predict on drawn shapes, in minutes on two CPU cores.
# make test: the default test suite.
# make test-processes: tests with several real processes, minutes long.
# make test-chaos: many faults in a run of two processes, minutes long.
# make test-kernels: the fused attention on this machine's GPU or TPU; .venv needs JAX for it, as "jax[cuda12]".
# make test-chips: compiles the demo for a TPU and for GPUs, without any, in an environment of its own (1.2 GB more).
PYTHON ?= python3
VENV ?= .venv
DEMO ?= runs/demo
DEMO_FLAGS ?=
BIN = $(VENV)/bin

.PHONY: demo test test-slow test-processes test-chaos test-kernels test-chips lint clean

# The environment is made anew when what it is made from has changed.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/cdetr train --config=configs/demo.py --workdir=$(DEMO) $(DEMO_FLAGS)
	$(BIN)/cdetr evaluate --weights=$(DEMO)
	$(BIN)/cdetr predict --weights=$(DEMO) --from-eval=12 --output=$(DEMO)/found
	@echo
	@echo "The demo is done. Its results:"
	@echo "  pictures with what was found   $(DEMO)/found/ (all in one: $(DEMO)/found/sheet.png)"
	@echo "  loss and AP over time          $(DEMO)/curve.png"
	@echo "  where it looks, over time      $(DEMO)/pictures/ (the newest: $(DEMO)/eval.png)"
	@echo "  all metrics                    $(DEMO)/metrics.jsonl"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

test-processes: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m 'processes and not chaos'

test-chaos: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m chaos -rP

test-kernels: $(VENV)/.installed-test
	$(BIN)/python -c "import jax; exit(jax.default_backend() == 'cpu' and 'JAX finds no GPU or TPU')"
	TESTS_ON= JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest tests/models/test_attention.py -k fused

test-chips:
	$(PYTHON) -m venv $(VENV)-chips
	$(VENV)-chips/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[test]' 'jax[tpu,cuda12-local]'
	$(VENV)-chips/bin/python -m pytest -m chips tests/test_cli_benchmark_compile.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(VENV)-chips runs
