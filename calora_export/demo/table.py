"""Prints the demo's results as Markdown: `python -m calora_export.demo.table [RESULTS.json]`.

With `requantised` in the place of a file, it measures what quantising the base once more costs; a number behind it
draws so many held-out prompts per task instead of the bundle's 200.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from calora_export.demo.results import Results

RESULTS = Path(__file__).with_name("results.json")
COLUMNS = {
    "no_adapter": "uncompressed, no adapter",
    "lora": "uncompressed + LoRA",
    "lora_moved": "that LoRA moved to the compressed base",
    "lora_compressed": "LoRA trained on the compressed base",
    "calora": "CA-LoRA on the compressed base",
}
ROUTER_ROWS = {
    "single_sentences": "one sentence, top 1",
    "single_set": "one sentence, the set selected by top p",
    "composite_sentences": "two sentences routed one by one, both right",
    "composite_set": "two sentences as one text, the set selected by top p",
}


def table(results: Results) -> str:
    """Two Markdown tables (tasks and router, in percent) and a line on how they were made."""
    scores = [msgspec.structs.asdict(task) for task in results.tasks]
    tasks = [["task", *COLUMNS.values()], ["---", *["---:"] * len(COLUMNS)]]
    tasks += [[task["task"], *(f"{task[key]:.1f}" for key in COLUMNS)] for task in scores]
    means = (sum(task[key] for task in scores) / len(scores) for key in COLUMNS)
    tasks.append(["**mean**", *(f"**{mean:.1f}**" for mean in means)])
    rates = msgspec.structs.asdict(results.router)
    router = [["router", "accuracy"], ["---", "---:"]]
    router += [[title, f"{rates[key]:.1f}"] for key, title in ROUTER_ROWS.items()]
    made = results.provenance
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    note = (
        f"{results.parameters / 1e6:.2f} M parameters; {made.seconds.all} s on {made.cores} CPU cores, "
        f"of which {made.seconds.base} s for the base; {versions}."
    )
    return "\n\n".join(["\n".join(f"| {' | '.join(row)} |" for row in block) for block in (tasks, router)] + [note])


def main() -> None:
    if sys.argv[1:2] == ["requantised"]:
        from calora_export.demo import requantised  # torch and transformers take seconds to import

        for line in requantised.measured(int(sys.argv[2]) if len(sys.argv) > 2 else 0):
            print(line, flush=True)  # half a table is worth minutes too
        return
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    print(table(msgspec.json.decode(path.read_bytes(), type=Results)))


if __name__ == "__main__":
    main()
