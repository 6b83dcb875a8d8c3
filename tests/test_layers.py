"""The layers as the source has them: who prints, who exits, who imports whom, and how long a module is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import calora_export

ROOT = Path(calora_export.__file__).parent
MODULES = {file.relative_to(ROOT).as_posix(): file for file in sorted(ROOT.rglob("*.py"))}
COMMAND_LINE = {"cli.py", "screen.py", "__main__.py", "demo/train.py", "demo/table.py"}
CHILDREN = ("devices/host.py", "devices/reference.py")  # processes of their own, which tell by stderr and exit code
LIMIT = 600
FLOW = {"calora_export.cli", "calora_export.pipeline", "calora_export.validation"}


def parsed(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"), name)


def dotted(node: ast.expr) -> str:
    """`sys.stdout.write` of the expression, or nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def says_or_exits(tree: ast.AST) -> Iterator[str]:
    """Names by which a module would print or end the process."""
    speaking = ("print", "input", "exit", "quit", "os._exit", "sys.exit", "os.abort", "SystemExit", "typer.Exit")
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = dotted(node)
            if name in speaking or name.startswith(("sys.stdout", "sys.stderr", "warnings.warn", "typer.echo")):
                yield f"{name} in line {node.lineno}"


def imported(tree: ast.AST) -> set[str]:
    """Full names of the modules (or of what is taken from them) that a module imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_there_is_something_to_check() -> None:
    assert {"cli.py", "pipeline.py", "targets/onnx.py", *CHILDREN} <= set(MODULES)
    assert "print in line 1" in list(says_or_exits(ast.parse("print(1)")))
    assert imported(ast.parse("def f():\n from calora_export import cli")) >= {"calora_export.cli"}


@pytest.mark.parametrize("name", sorted(set(MODULES) - COMMAND_LINE))
def test_only_the_command_line_prints_and_exits(name: str) -> None:
    found = [line for line in says_or_exits(parsed(name))]
    if name in CHILDREN:
        found = [line for line in found if not line.startswith(("print", "sys.stderr", "SystemExit"))]
    assert found == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_fits_on_a_few_screens(name: str) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= LIMIT


@pytest.mark.parametrize("name", [name for name in MODULES if name.split("/")[0] in ("targets", "devices", "runtimes")])
def test_no_step_reaches_back_to_the_flow(name: str) -> None:
    assert imported(parsed(name)) & FLOW == set()


@pytest.mark.parametrize("name", sorted(set(MODULES) - COMMAND_LINE - {"testing.py"}))  # an app's own tests do, too
def test_only_the_command_line_starts_the_flow(name: str) -> None:
    assert imported(parsed(name)) & {"calora_export.cli", "calora_export.pipeline"} == set()


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("targets/")])
def test_a_target_sees_a_graph_and_no_bundle(name: str) -> None:
    hidden = {f"calora_export.{module}" for module in ("bundle", "composing", "model", "devices")}
    assert imported(parsed(name)) & hidden == set()
