# Needs Python 3.10 or newer with its venv module, and make. Another interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:
	@echo "make demo    fit a teacher, distil a DeiT-Ti on handwritten digits (CPU, no data to download) -> outputs/demo"
	@echo "make test    run the tests"
	@echo "make lint    check style and formatting with ruff"
	@echo "make clean   delete $(VENV), outputs/demo and caches; other outputs stay"

# --quiet leaves the script's own error message as the last word. Without the thread count accelerate warns and guesses.
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

# A stamp is younger than its requirements file once everything in that file is installed.
$(VENV)/%.stamp: %.txt | $(BIN)/pip
	@echo "Installing $< into $(VENV) (minutes and gigabytes the first time: PyTorch)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

$(VENV)/requirements-dev.stamp: requirements.txt

# pip is the last thing that venv writes, so a venv without it was interrupted and is made anew.
$(BIN)/pip:
	@"$(PYTHON)" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		found=$$("$(PYTHON)" --version 2>&1) || found="no $(PYTHON)"; \
		echo "This needs Python 3.10 or newer with its venv module (Debian, Ubuntu: apt install python3-venv)," \
			"but found $$found. Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -m venv --clear $(VENV)
