PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TINY   := --dataset tiny --backbone tiny

.PHONY: install test lint docs demo live clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The tables of README.md and docs/ that the code knows.
docs: install
	$(BIN)/python docs/flags.py

# The whole toolkit on the tiny world: data set, its contact sheet, features, all methods, report.
demo: install
	$(BIN)/python data/tiny/make_split.py
	$(BIN)/python data/tiny/contact_sheet.py
	$(BIN)/python create_features.py --dataset corpus --backbone tiny
	$(BIN)/python create_features.py $(TINY) --icir_source wds
	$(BIN)/python run_retrieval.py $(TINY) --method all --use_preset --report

# The tiny world searched live, on a page.
live: install
	$(BIN)/python search.py --demo

clean:
	rm -rf features/tiny_features results/tiny
