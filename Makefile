# Needs Python 3.10 or newer with its venv module. To use another interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:
	@echo "make demo    fit a teacher, distil a DeiT-Ti on handwritten digits (CPU, no data to download) -> outputs/demo"
	@echo "make test    run the tests"
	@echo "make lint    check style and formatting with ruff"
	@echo "make clean   delete $(VENV), outputs/demo and caches, but no other outputs"

# --quiet: the last line is the script's own error message. Without a thread count, accelerate warns and guesses.
demo: $(VENV)/requirements.stamp
	@rm -rf outputs/demo outputs/demo-teachers
	@$(BIN)/accelerate launch --quiet --config_file accelerate_configs/cpu.yaml \
		--num_cpu_threads_per_process "$$(getconf _NPROCESSORS_ONLN)" \
		train_hf.py --config recipes/digits.yaml --output_dir outputs/demo --teacher_output_dir outputs/demo-teachers

test: $(VENV)/requirements-dev.stamp
	@$(BIN)/python -m pytest

lint: $(VENV)/requirements-dev.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

clean:
	@rm -rf $(VENV) outputs/demo outputs/demo-teachers .pytest_cache .ruff_cache .hypothesis build *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than its requirements file once everything in that file is installed.
$(VENV)/%.stamp: %.txt | $(BIN)/pip
	@echo "Installing $< into $(VENV) (the first time, PyTorch takes minutes and gigabytes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

$(VENV)/requirements-dev.stamp: requirements.txt

# venv writes pip last, so a venv without pip was interrupted and is created again.
$(BIN)/pip:
	@"$(PYTHON)" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		found=$$("$(PYTHON)" --version 2>&1) || found="no $(PYTHON)"; \
		echo "This needs Python 3.10 or newer with its venv module (Debian, Ubuntu: apt install python3-venv)," \
			"but found $$found. To use another one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -m venv --clear $(VENV)
