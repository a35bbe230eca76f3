# Every target sets itself up: the virtual environment is made once from requirements.lock.
PYTHON ?= python3.11
PY := .venv/bin/python
READY := .venv/.ready
BENCHMARKS := sae_step sae_grid evaluation lm_trunk bootstrap topology odor_model sequence_ops codec_lm scale tuning information

SHARED := --dist loadfile --no-loadscope-reorder  # the processes share the files

# TORCH=cpu: torch's builds for CPUs, where the package index that pip is configured for has them.
define SET_UP
@echo "setting up .venv: about 8 GB, one to three minutes the first time"
$(PYTHON) -m venv .venv
$(PY) -P sweeps/core/set_up.py $(TORCH)
touch $(READY)
endef

.PHONY: venv torch proxy-gap test test-rest test-all lint bench ui cluster-up cluster-down clean

venv: $(if $(TORCH),torch,$(READY))

$(READY): requirements.lock
	$(SET_UP)

torch:
	$(SET_UP)

proxy-gap: $(READY)  # in packs of 24 cells: in two of 48 the small model's ends early, and its core waits for the other
	$(PY) sweeps/proxy_gap.py --set cells_per_pack=24

test: $(READY)
	$(PY) -m pytest -n 2 $(SHARED) -m "not slow or daily"

test-rest: $(READY)  # what `make test` leaves out: kills and clusters, which mostly wait, so four share two cores
	$(PY) -m pytest -n 4 $(SHARED) --durations=30 -m "slow and not daily"

test-all: test test-rest

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(READY)  # measures every speed claim; QUICK=1 runs every benchmark small, to see that it works
ifdef QUICK
	for b in $(BENCHMARKS); do OMP_NUM_THREADS=1 $(PY) benchmarks/$$b.py --quick || exit 1; done
else
	$(PY) benchmarks/page.py
endif

ui: $(READY)
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false .venv/bin/mlflow server --backend-store-uri sqlite:///runs/mlflow.db \
		--artifacts-destination runs/mlartifacts --host 127.0.0.1 --port 5000

CONFIG ?= cluster.yaml
TIMEOUT ?= 1800

cluster-up: $(READY)
	$(PY) -m sweeps.launch.pods up --config $(CONFIG) --timeout $(TIMEOUT)

cluster-down: $(READY)
	$(PY) -m sweeps.launch.pods down --config $(CONFIG)

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .numba_cache
	find . -path ./.venv -prune -o -name '*.nb[ci]' -exec rm {} +  # numba's compiled kernels
