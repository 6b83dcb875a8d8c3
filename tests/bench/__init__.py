"""The benchmark: our package, the model builder's and llama.cpp's, in one run (`python -m tests.bench`).

shapes.py     writes the inputs: model, tokenizer, adapters, bundle
process.py    runs a command, times it and takes its peak memory
peers.py      what the others make of the inputs
ours.py       what our command line makes of them
drivers.py    one driver per runtime: load, prefill, decode
measure.py    interleaved rounds over the drivers; medians of per-round ratios
table.py      the goals and the Markdown
"""
