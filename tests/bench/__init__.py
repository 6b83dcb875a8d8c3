"""The benchmark: our packages, the builder's, transformers' and llama.cpp's, in one run (`python -m tests.bench`).

shapes.py     writes the inputs: model, tokenizer, adapters, bundle
process.py    runs a command, times it and takes its peak memory
ours.py       what our command line makes of the inputs
peers.py      what the model builder and llama.cpp make of them
upstream.py   what transformers' ExecuTorch exporter makes of them
exporting.py  rounds over all of these
drivers.py    one driver per runtime in Python: load, prefill, decode
worker.py     a driver in a process of its own
runner.py     our ExecuTorch package in the native runner
measure.py    interleaved rounds over workers and runner
results.py    medians of per-round ratios; the goals
table.py      the Markdown
"""
