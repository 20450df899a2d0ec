# Everything sets itself up in .venv, from Python 3.10 or newer; the second time is quick.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TYPED := build/typecheck
ECOSYSTEM := build/ecosystem

.PHONY: help report test test-ecosystem test-triton test-torch test-python lint newcomer docs docs-site accessibility figures clean

help:  ## Say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

report: $(READY)  ## Run the case studies and write out/report.html (under five minutes on two cores)
	$(BIN)/fpe report

test: $(READY)  ## Run the tests
	$(BIN)/python -m pytest tests -n auto

newcomer: $(READY)  ## Run twenty commands of a newcomer, in their quick forms
	mkdir -p build/newcomer && cd build/newcomer && $(CURDIR)/$(BIN)/python $(CURDIR)/tests/newcomer.py

test-ecosystem: $(ECOSYSTEM)/.ready  ## Run the tests beside transformers, peft, timm and trainers, in an environment of their own
	$(ECOSYSTEM)/bin/python -m pytest tests/ecosystem -n auto

test-triton: $(READY)  ## Imports, compilations and the dry run with another Triton: make test-triton VERSION=3.6.0
	$(BIN)/python -m pip install --quiet --no-deps --target build/triton-$(VERSION) triton==$(VERSION)
	PYTHONPATH=build/triton-$(VERSION) $(BIN)/python -m fpe.bench.gpu.compatible out/versions.jsonl

test-torch: $(READY)  ## The same with another PyTorch and its Triton, gigabytes: make test-torch VERSION=2.11.0
	$(BIN)/python -m pip install --quiet --target build/torch-$(VERSION) torch==$(VERSION)
	PYTHONPATH=build/torch-$(VERSION) $(BIN)/python -m fpe.bench.gpu.compatible out/versions.jsonl

test-python:  ## The same with another Python: make test-python VERSION=3.12
	python$(VERSION) -m venv build/python-$(VERSION)
	build/python-$(VERSION)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,test]'
	build/python-$(VERSION)/bin/python -m fpe.bench.gpu.compatible out/versions.jsonl

lint: $(READY)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)
	cp -R fpe $(TYPED)/fpe && cp -R kernels bench $(TYPED)/fpe
	cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p fpe

docs-site: $(READY)  ## Build the documents' site with its API reference into build/site (needs: pip install -e '.[site]')
	rm -rf build/docs build/api && mkdir -p build/api && cp -R docs build/docs
	sed 's#](docs/#](#g' README.md > build/docs/index.md
	for name in CONTRIBUTING CHANGELOG; do sed 's#](docs/#](#g' $$name.md > build/docs/$$name.md; done
	cp -R fpe build/api && cp -R kernels build/api/fpe
	find build/api -name '*.py' -exec sed -i -E 's/:[a-z]+:`~?([^`]+)`/`\1`/g; s/::$$/:/' {} +  # to Markdown
	$(BIN)/python -m mkdocs build --strict --quiet

accessibility: docs-site  ## Search the report and the site for barriers, with axe-core (needs Chromium and npm)
	npm install --silent --no-save --prefix build/axe axe-core@4.14.1
	$(BIN)/fpe report --quick --output build/report
	$(BIN)/python tests/accessibility.py build/axe/node_modules/axe-core/axe.min.js build/site build/report

figures: docs  ## Draw the documents' figures and tables from the committed results

docs: $(READY)  ## The same
	$(BIN)/fpe docs

clean:  ## Remove the environment and everything built
	rm -rf $(VENV) build out *.egg-info

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,test,lint]'
	touch $@

$(ECOSYSTEM)/.ready: setup.py pyproject.toml constraints.txt constraints-ecosystem.txt
	$(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/python -m pip install --quiet --constraint constraints.txt \
		--constraint constraints-ecosystem.txt --editable '.[bench,ecosystem,test]'
	touch $@
