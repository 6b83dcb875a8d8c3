"""Jobs and traces as files: what any device in any language must write, and what happens when it does not."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest

from calora_export.errors import DeviceError
from calora_export.jobs import (
    LOGITS,
    TRACE,
    Answer,
    Case,
    Completion,
    Job,
    Safety,
    SafetyTrace,
    Timing,
    TimingTrace,
    Trace,
    read_job,
    read_trace,
    write_job,
    write_trace,
)

VOCAB = 3
JOB = Job(
    threads=2,
    cases=(Case("base", {}, (1, 2, 3, 4), 3), Case("mix:a+b", {"a": 0.6, "b": 0.4}, (1, 2), 1)),
    routes=((5, 6),),
    completions=(Completion("a", (7,), 2),),
    safety=Safety({"a": 1.0}, {}, (1, 2), "forged.bin"),
    timing=Timing("a", "", (1,), 1, 1, 1),
)
ANSWER = Answer(
    device="board",
    arch="arm64",
    os="Linux",
    runtime="onnx",
    vocab=VOCAB,
    gates=((1.0, 0.0),),
    completions=((9, 0),),
    safety=SafetyTrace(aba=True, fresh=True, stale=True, refused=True),
    timing=TimingTrace(1.0, (1.0,), (), (), {"base": (1.0,)}, ()),
    peak_rss=1,
)
NUMBERS = [float(number) for number in range(4 * VOCAB)]


def write_by_hand(directory: Path) -> Path:
    """A trace as a C or JavaScript runner would write it: JSON, and little-endian floats one after another."""
    (directory / TRACE).write_text(msgspec.json.encode(ANSWER).decode())
    (directory / LOGITS).write_bytes(struct.pack(f"<{len(NUMBERS)}f", *NUMBERS))
    return directory


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    write_job(tmp_path, JOB)
    assert read_job(tmp_path) == JOB
    document = json.loads((tmp_path / "job.json").read_text())
    assert document["cases"][1] == {"name": "mix:a+b", "mix": {"a": 0.6, "b": 0.4}, "ids": [1, 2], "prefill": 1}


def test_a_trace_written_by_hand_is_read_case_by_case(tmp_path: Path) -> None:
    trace = read_trace(write_by_hand(tmp_path), JOB)
    assert trace.answer == ANSWER
    assert trace.logits["base"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert trace.logits["mix:a+b"].tolist() == [[6, 7, 8], [9, 10, 11]]


def test_a_written_trace_has_the_documented_bytes(tmp_path: Path) -> None:
    rows = np.array(NUMBERS, np.float64).reshape(4, VOCAB)
    write_trace(tmp_path, Trace(ANSWER, {"base": rows[:2], "mix:a+b": rows[2:]}))
    assert (tmp_path / LOGITS).read_bytes() == struct.pack(f"<{len(NUMBERS)}f", *NUMBERS)
    assert json.loads((tmp_path / TRACE).read_text())["safety"]["refused"] is True


def test_a_job_without_cases_has_no_logits(tmp_path: Path) -> None:
    job = Job(threads=1)
    answer = msgspec.structs.replace(ANSWER, gates=(), completions=(), safety=None, timing=None)
    write_trace(tmp_path, Trace(answer, {}))
    assert read_trace(tmp_path, job).logits == {}


@pytest.mark.parametrize("length", [0, 4 * len(NUMBERS) - 4, 4 * len(NUMBERS) - 1, 4 * len(NUMBERS) + 4])
def test_logits_of_another_length_are_an_incomplete_answer(tmp_path: Path, length: int) -> None:
    file = write_by_hand(tmp_path) / LOGITS
    file.write_bytes((file.read_bytes() + b"\0" * 4)[:length])
    with pytest.raises(DeviceError, match=rf"^logits.bin: bytes: expected 48, found {length} "):
        read_trace(tmp_path, JOB)


@pytest.mark.parametrize("name", [TRACE, LOGITS])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_by_hand(tmp_path) / name).unlink()
    with pytest.raises(DeviceError, match=f"^{name}: file: expected a file, found nothing"):
        read_trace(tmp_path, JOB)


@pytest.mark.parametrize(
    ("key", "value"),
    [("gates", []), ("completions", []), ("completions", [[1], [2]]), ("safety", None), ("timing", None)],
)
def test_a_device_that_leaves_something_out_is_no_device_that_passed(
    tmp_path: Path, key: str, value: object
) -> None:
    file = write_by_hand(tmp_path) / TRACE
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(DeviceError, match=f"^trace.json: {key}: expected .*, found .*did not answer all"):
        read_trace(tmp_path, JOB)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "trace.json: device: expected this key, found nothing"),
        ("not JSON", "trace.json: JSON: expected a valid JSON document"),
        ('{"colour": 1}', "trace.json"),
    ],
)
def test_nonsense_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (write_by_hand(tmp_path) / TRACE).write_text(text)
    with pytest.raises(DeviceError) as caught:
        read_trace(tmp_path, JOB)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
