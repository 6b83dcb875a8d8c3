"""`browser:` in a real Chromium: what it computes, and what breaks there.

Every fault is a real one. Each ends in one line that names the device and the step, and leaves neither a process nor a
file.
"""

from __future__ import annotations

import http.client
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest

from calora_export import devices, onnxruntime_web
from calora_export import package as packages
from calora_export.devices import browser, host
from calora_export.devices._page_server import PageServer
from calora_export.errors import DeviceError
from calora_export.jobs import Case, Completion, InterruptedRun, Job, Safety, SafetyTrace, Timing, Trace
from calora_export.package import Package
from tests.conftest import Export, Variant
from tests.devices.beds import BrowserBed, interruptible, wait_for
from tests.devices.sshd import free_port
from tests.packages import copy_package, refresh
from tests.tampering import adapter_file

IDS = tuple(range(40, 60))
SMALL = Job(threads=1, cases=(Case("base", {}, IDS, 16), Case("mix", {"alpha": 0.7, "beta": -0.4}, IDS, 16)))
ENDLESS = Job(threads=1, cases=SMALL.cases, timing=Timing("alpha", "beta", IDS, decode=100, rounds=10**6, swaps=1))


@pytest.fixture
def web(exported: Export) -> Package:
    return packages.load(exported("onnx-web"))


def fault(package: Package, job: Job = SMALL, device: str = "browser") -> str:
    with pytest.raises(DeviceError) as caught:
        devices.run(device, package, job)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"{device}: "), line
    return line.removeprefix(f"{device}: ")


class Running:
    """A job that does not end by itself, in a thread."""

    def __init__(self, package: Package, device: str = "browser") -> None:
        self.line, self._here = "", threading.Event()
        self.begun: Trace | None = None
        self._thread = threading.Thread(target=self._run, args=(device, package))
        self._thread.start()
        assert self._here.wait(60), self.line

    def _run(self, device: str, package: Package) -> None:
        try:
            devices.run(device, package, ENDLESS, lambda line: self._here.set() if "running" in line else None)
        except InterruptedRun as error:
            self.line, self.begun = str(error), error.begun

    def end(self) -> str:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.line


def measured(bed: BrowserBed) -> None:
    """Until all cases of a job are done, before it comes to what does not end."""
    size = 2 * 5 * 256 * 4
    wait_for(lambda: any(file.stat().st_size == size for file in bed.scratch.glob("*/logits.bin")))


# ── addresses ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("address", "provider", "port"),
    [
        ("", "wasm", None),
        ("webgpu", "webgpu", None),
        ("listen", "wasm", 0),
        ("listen:8080", "wasm", 8080),
        ("webgpu:listen:8080", "webgpu", 8080),
    ],
)
def test_addresses(address: str, provider: str, port: int | None) -> None:
    made = browser.parse(address)
    assert (made.provider, made.port) == (provider, port)
    assert made.name == (f"browser:{address}" if address else "browser")


@pytest.mark.parametrize("address", ["gpu", "listen:", "listen:x", "listen:70000", "listen:1:2", "listen:webgpu", ":"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(DeviceError) as caught:
        browser.parse(address)
    expected = f"--device: browser:{address}: expected browser[:webgpu][:listen[:PORT]], found another form"
    assert str(caught.value) == expected


# ── it works ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_its_numbers_are_those_of_floats(web: Package, browser_bed: BrowserBed) -> None:
    """No kernel of WebAssembly rounds what packed weights read. And what the browser says of itself."""
    job = Job(threads=2, cases=SMALL.cases, completions=(Completion("alpha", (70, 71), 6),))
    made, expected = devices.run("browser", web, job), host.answer(web, job)
    for name, reference in expected.logits.items():
        np.testing.assert_allclose(made.logits[name], reference, atol=1e-3)
    answer = made.answer
    assert answer.completions == expected.answer.completions
    assert "WebAssembly, 2 threads, cross-origin isolated" in answer.runtime and answer.threads == 2
    assert answer.device.startswith("Chrom") and answer.os.startswith("Linux") and answer.arch == platform.machine()
    assert (answer.peak_rss or 0) > 2e7, "Linux says what a process of Chromium takes"
    assert not answer.emulated


@pytest.mark.heavy
def test_its_own_adapter_is_no_forgery(web: Package, browser_bed: BrowserBed) -> None:
    """And two equal mixes cannot prove that caches are apart."""
    same = {"alpha": 1.0}
    job = Job(threads=1, safety=Safety(same, same, IDS, str(adapter_file(web.path, "alpha"))))
    assert devices.run("browser", web, job).answer.safety == SafetyTrace(True, True, stale=False, refused=False)


@pytest.mark.heavy
def test_fp16_rows_are_scaled(tiny: Path, variant: Variant, browser_bed: BrowserBed) -> None:
    package = packages.load(variant(tiny, "onnx-web", adapters="fp16"))
    made, expected = devices.run("browser", package, SMALL), host.answer(package, SMALL)
    np.testing.assert_allclose(made.logits["mix"], expected.logits["mix"], atol=1e-3)
    assert np.abs(made.logits["mix"] - made.logits["base"]).max() > 1e-2


@pytest.mark.heavy
def test_webgpu_by_software(web: Package, browser_bed: BrowserBed) -> None:
    """Chromium's own stand-in for a GPU: the same numbers, and times that mean nothing."""
    job = Job(threads=1, cases=(Case("base", {}, IDS[:8], 6), Case("mix", {"alpha": 0.7, "beta": -0.4}, IDS[:8], 6)))
    made, expected = devices.run("browser:webgpu", web, job), host.answer(web, job)
    for name, reference in expected.logits.items():
        np.testing.assert_allclose(made.logits[name], reference, atol=1e-3)
    assert "WebGPU on" in made.answer.runtime and made.answer.peak_rss is None
    assert made.answer.emulated is ("swiftshader" in made.answer.runtime)


def test_a_person_opens_the_page(web: Package, browser_bed: BrowserBed, tmp_path: Path) -> None:
    """In a browser that this tool did not start; a second page is turned away."""
    asked: list[str] = []

    def open_page(line: str) -> None:
        if isinstance(line, devices.Request):
            asked.append(line)
            url = next(word for word in line.split() if "localhost" in word)
            command = [*browser._program(), "--headless=new", "--no-sandbox", "--remote-debugging-pipe"]
            command += [f"--user-data-dir={tmp_path / 'own'}", url]
            started.append(subprocess.Popen(["sh", "-c", browser.START, "sh", *command], stdin=subprocess.PIPE))
        elif "running" in line:
            url = next(word for word in asked[0].split() if "localhost" in word)
            with pytest.raises(urllib.error.HTTPError, match="409"):
                urllib.request.urlopen(f"{url}alive")

    started: list[subprocess.Popen[bytes]] = []
    try:
        made = devices.run("browser:listen", web, SMALL, open_page)
    finally:
        for process in started:
            process.communicate()
    assert len(asked) == 1 and "adb reverse tcp:" in asked[0]
    np.testing.assert_allclose(made.logits["mix"], host.answer(web, SMALL).logits["mix"], atol=1e-3)
    assert made.answer.peak_rss is None, "a page is not told, and it may be another machine's"


# ── it breaks ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_tab_is_closed(web: Package, browser_bed: BrowserBed, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("CALORA_BROWSER", f"{browser._program()[0]} --remote-debugging-port={port}")
    running = Running(web)
    measured(browser_bed)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
        (page,) = [target["id"] for target in json.load(answer) if target["type"] == "page"]
    urllib.request.urlopen(f"http://127.0.0.1:{port}/json/close/{page}").close()
    assert running.end() == "browser: run: the page was closed, or crashed"
    assert running.begun is not None and list(running.begun.logits) == ["base", "mix"]
    browser_bed.nothing_is_left()
    devices.run("browser", web, SMALL)


def test_the_page_crashes(web: Package, browser_bed: BrowserBed) -> None:
    running = Running(web)
    for pid in browser_bed.processes("--type=renderer"):
        os.kill(pid, signal.SIGKILL)
    assert running.end() == "browser: run: the page was closed, or crashed"


def test_the_browser_is_killed(web: Package, browser_bed: BrowserBed) -> None:
    """What it had measured is kept."""
    running = Running(web)
    measured(browser_bed)
    os.kill(browser_bed.main(), signal.SIGKILL)
    assert running.end() == "browser: run: the browser was killed by SIGKILL"
    assert running.begun is not None and list(running.begun.logits) == ["base", "mix"]


def test_the_page_hangs(web: Package, browser_bed: BrowserBed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "LIMIT_S", 3)
    running = Running(web)
    for pid in browser_bed.processes("--type=renderer"):
        os.kill(pid, signal.SIGSTOP)
    assert running.end() == "browser: run: no answer after 3 s"


def test_ctrl_c(web: Package, browser_bed: BrowserBed) -> None:
    """As from a terminal, which interrupts the whole group of processes."""
    command = [sys.executable, "-m", "calora_export", "bench", str(web.path), "--device", "browser"]
    process = subprocess.Popen(command, stderr=PIPE, text=True, start_new_session=True, preexec_fn=interruptible)
    wait_for(lambda: bool(browser_bed.processes("--type=renderer")))
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, "error: interrupted; nothing was changed\n")


def test_this_machine_goes_away(web: Package, browser_bed: BrowserBed) -> None:
    """Nobody is there to end the browser: it ends by itself. What it wrote stays, since nobody can remove it."""
    command = [sys.executable, "-m", "calora_export", "bench", str(web.path), "--device", "browser"]
    process = subprocess.Popen(command)
    wait_for(lambda: bool(browser_bed.processes("--type=renderer")))
    process.kill()
    process.wait()
    wait_for(lambda: not browser_bed.processes())
    for left in browser_bed.scratch.iterdir():
        shutil.rmtree(left)


def test_no_browser(web: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(browser, "MAC", tmp_path / "none")
    expected = "Chromium: expected installed, found not (install Chromium or Chrome, or name it in CALORA_BROWSER)"
    assert fault(web) == expected
    assert browser.state() == f"not found: browser: {expected}"
    monkeypatch.setenv("CALORA_BROWSER", "firefox-of-mine --quiet")
    assert fault(web) == "firefox-of-mine: expected installed, found not (CALORA_BROWSER names it)"


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("echo first >&2; echo no display >&2; exit 3", "the browser ended with code 3: no display"),
        ("kill -9 $$", "the browser was killed by SIGKILL"),
        ("exec sleep 60", "no answer after 1 s"),
    ],
)
def test_a_browser_that_never_opens_the_page(
    web: Package, browser_bed: BrowserBed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, line: str
) -> None:
    program = tmp_path / "browser"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("CALORA_BROWSER", str(program))
    monkeypatch.setattr(browser, "START_S", 1)
    assert fault(web) == f"connect: {line}"


def test_why_a_browser_gives_up(
    web: Package, browser_bed: BrowserBed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where temporary files lie too deep for its sockets."""
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    assert fault(web).startswith("connect: the browser was killed by SIGABRT: Socket path too long: ")


def test_nobody_opens_the_page(web: Package, browser_bed: BrowserBed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "VISIT_S", 0.3)
    assert fault(web, device="browser:listen") == "connect: no answer after 0.3 s"


def test_a_port_that_is_taken(web: Package, browser_bed: BrowserBed) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        device = f"browser:listen:{taken.getsockname()[1]}"
        assert fault(web, device=device) == "listen: Address already in use"


def test_broken_webassembly(
    web: Package, browser_bed: BrowserBed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Path(shutil.copytree(onnxruntime_web.directory(), tmp_path / "runtime"))
    wasm = runtime / "ort-wasm-simd-threaded.wasm"
    wasm.write_bytes(wasm.read_bytes()[:5_000_000])
    monkeypatch.setattr(onnxruntime_web, "directory", lambda: runtime)
    assert fault(web).startswith("run: ONNX Runtime Web does not start: [wasm] RuntimeError: ")


@pytest.mark.parametrize("name", ["model.onnx.data", "adapters/alpha.onnx_adapter"])
def test_a_damaged_file(web: Package, browser_bed: BrowserBed, tmp_path: Path, name: str) -> None:
    copy = copy_package(web.path, tmp_path / "package")
    (copy / name).write_bytes(b"of another kind")
    refresh(copy)
    job = Job(threads=1, cases=(Case("alpha", {"alpha": 1.0}, IDS, 16),), routes=((1, 2),))
    what = name.removesuffix(".data").removeprefix("adapters/")
    assert fault(packages.load(copy), job).startswith(f"run: {what}: ")


def test_an_adapter_that_is_not_there(web: Package, browser_bed: BrowserBed) -> None:
    job = Job(threads=1, cases=(Case("base", {"gamma": 1.0}, IDS, 16),))
    assert fault(web, job) == "run: package.json: adapters: expected one of alpha, beta, found gamma"


def test_cores_cannot_be_chosen(web: Package) -> None:
    expected = "cores: expected a profile without them, found some (a page has no say in it)"
    assert fault(web, Job(threads=1, cores=(0,))) == expected


def test_a_package_for_another_runtime(package: Path) -> None:
    hint = "export again with --recipe onnx-web"
    expected = f"recipe: expected onnx-web, or one like it, found onnx-int4 for onnx ({hint})"
    assert fault(packages.load(package)) == expected


# ── the server ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_who_knows_the_secret_is_served(tmp_path: Path) -> None:
    (tmp_path / "a.wasm").write_bytes(b"\0asm")
    with PageServer("127.0.0.1", 0, {"a.wasm": tmp_path / "a.wasm"}, tmp_path) as server:
        asked = http.client.HTTPConnection("127.0.0.1", server.server_port)
        found = {}
        for path in (f"{server.path}a.wasm", "/a.wasm", f"{server.path}../a.wasm", f"{server.path}b", "/", ""):
            asked.request("GET", path)
            answer = asked.getresponse()
            found[path] = answer.status
            if answer.status == 200:
                assert answer.read() == b"\0asm" and answer.headers["Content-Type"] == "application/wasm"
                assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
                assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            answer.read()
        asked.close()
    assert sorted(found.values()) == [200, 404, 404, 404, 404, 404]


# ── in an app's own page ──────────────────────────────────────────────────────────────────────────────────────────────

TOKENIZER = """
export const encode = (text) => [...text].map((letter) => letter.charCodeAt(0));
export const decode = (ids) => ids.join(" ");
export const encodeForRouter = encode;
"""
ASK = """
const prompt = document.querySelector("#prompt");
prompt.value = "AB";
await prompt.onchange({ target: prompt });
await fetch("error", { method: "POST", body: document.querySelector("#answer").value });
"""


def test_the_page_of_the_documentation_runs(web: Package, browser_bed: BrowserBed, tmp_path: Path) -> None:
    """As it is printed there, with the modules that it names; of letters it makes tokens more simply."""
    text = (Path(browser.resources.root()) / "docs" / "browser.md").read_text()
    page = text.partition("```html\n")[2].partition("```")[0]
    names = "session.js, package.js, adapter.js, adapter_file.js, factors.js, safetensors.js, numbers.js, errors.js"
    assert names in text
    (tmp_path / "index.html").write_text(page.replace("</script>", ASK + "</script>"))
    (tmp_path / "tokenizer.js").write_text(TOKENIZER)
    own = browser.resources.target_dir("onnx") / "web"
    files = {name: tmp_path / name for name in ("index.html", "tokenizer.js")}
    files |= {f"calora/{name}": own / name for name in names.split(", ")}
    files |= {f"ort/{name}": onnxruntime_web.directory() / name for name in onnxruntime_web.BUILDS["wasm"]}
    files |= {f"package/{name}": web.path / name for name in ("package.json", *web.manifest.files)}
    server = PageServer("127.0.0.1", 0, files, tmp_path)
    with server, browser._started(browser._program(), browser.parse(""), server):
        _, said = server.events.get(timeout=60)
    ids = (65, 66)
    (gates,) = host.answer(web, Job(threads=1, routes=(ids,))).answer.gates
    assert web.manifest.router is not None
    mix = {name: gate for name, gate in zip(web.manifest.router.spec.classes, gates, strict=True) if gate > 0}
    forced = host.answer(web, Job(threads=1, cases=(Case("first", mix, ids, 2),))).logits["first"]
    assert said.split()[0] == str(forced[0].argmax()), said
