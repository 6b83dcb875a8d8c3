"""Chats: what is fed again after a swap, what is not, and pieces of text that are whole characters."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calora_export import generation, runtimes
from calora_export import package as packages
from calora_export.errors import CaloraError, PackageError
from calora_export.generation import Chat
from calora_export.package import Package
from calora_export.runtimes import Mix, Session

ALPHA, BETA = {"alpha": 1.0}, {"beta": 1.0}
LIMIT = 8


@pytest.fixture(scope="module")
def opened(package: Path) -> Package:
    return packages.load(package)


def session_of(package: Package) -> Session:
    return runtimes.load(package.manifest.target).open_session(package, 1)


@pytest.fixture
def chat(opened: Package) -> Chat:
    return Chat(opened, session_of(opened))


def ask(chat: Chat, prompt: str, mix: Mapping[str, float] | None) -> tuple[generation.Turn, list[int]]:
    """The turn, and the tokens of its answer."""
    turn = chat.start(prompt, mix)
    before = len(chat.history)
    list(chat.stream(LIMIT))
    return turn, chat.history[before:]


def greedy(package: Package, history: Sequence[int], mix: Mix, length: int) -> list[int]:
    """What a fresh session answers to the whole history, token by token."""
    session = session_of(package)
    session.select(mix)
    fed, made = list(history), []
    while len(made) < length:
        made.append(int(session.extend(fed)[-1].argmax()))
        fed = made[-1:]
    return made


# ── the cache ───────────────────────────────────────────────────────────────────────────────────────


def test_a_swap_in_mid_conversation_reads_the_history_under_the_new_adapters(chat: Chat, opened: Package) -> None:
    _, first = ask(chat, "one two", ALPHA)
    history = list(chat.history)
    turn, second = ask(chat, " three", BETA)
    whole = [*history, *b" three"]
    assert turn.prefill == len(whole) and turn.cache.startswith("filled again")
    assert second == greedy(opened, whole, BETA, len(second))
    assert first == greedy(opened, list(b"one two"), ALPHA, len(first))


def test_the_answer_after_a_swap_would_differ_with_the_old_cache(chat: Chat, opened: Package) -> None:
    """Else the test above could not fail."""
    ask(chat, "one two", ALPHA)
    session = chat.session
    history = [*chat.history, *b" three"]
    fresh = session_of(opened)
    fresh.select(BETA)
    session.select(BETA, keep_cache=True)
    stale = session.extend([*chat.history[-1:], *b" three"])[-1]
    assert np.abs(stale - fresh.extend(history)[-1]).max() > 0.01


def test_the_same_adapters_keep_the_cache(chat: Chat, opened: Package) -> None:
    ask(chat, "one two", ALPHA)
    history = list(chat.history)
    turn, second = ask(chat, " three", ALPHA)
    assert turn.prefill == 1 + len(" three"), "the last token of the answer was never fed"
    assert turn.cache == f"kept: the same adapters filled its {len(history) - 1} positions"
    assert second == greedy(opened, [*history, *b" three"], ALPHA, len(second))


def test_another_gate_is_another_mix(chat: Chat) -> None:
    ask(chat, "one", ALPHA)
    length = len(chat.history)
    turn, _ = ask(chat, "two", {"alpha": 0.5})
    assert turn.prefill == length + 3


def test_a_gate_of_zero_is_the_base(opened: Package) -> None:
    answers = [ask(Chat(opened, session_of(opened)), "one two", mix)[1] for mix in ({}, {"alpha": 0.0})]
    assert answers[0] == answers[1] == greedy(opened, list(b"one two"), {}, len(answers[0]))


# ── the router ──────────────────────────────────────────────────────────────────────────────────────


def test_the_router_chooses_by_the_names_of_its_classes(chat: Chat) -> None:
    gates = chat.session.route(list(b"one two"))
    turn, _ = ask(chat, "one two", None)
    assert turn.routed
    assert turn.mix == {n: float(g) for n, g in zip(("alpha", "beta"), gates, strict=True) if g > 0}


def test_a_package_without_router_says_so(opened: Package) -> None:
    bare = Package(opened.path, msgspec.structs.replace(opened.manifest, router=None))
    with pytest.raises(PackageError, match="name one with --adapter"):
        Chat(bare, session_of(bare)).start("one", None)


# ── a router per sentence ───────────────────────────────────────────────────────────────────────────


class Routed:
    """A session whose answer is written down; what the router read decides between alpha and beta."""

    def __init__(self, answer: bytes) -> None:
        self.rest, self.mix = [*answer, 0], {}
        self.read: list[str] = []  # by the router
        self.fed: list[tuple[str, str]] = []  # under which adapter, what

    def select(self, mix: Mix, *, keep_cache: bool = False) -> None:
        assert not keep_cache
        self.mix = dict(mix)

    def forget(self) -> None: ...

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        self.fed.append((",".join(self.mix), bytes(ids).decode()))
        return np.eye(256)[[self.rest.pop(0)]]

    def route(self, ids: Sequence[int]) -> np.ndarray:
        text = bytes(ids).decode()
        self.read.append(text)
        return np.array([0.0, 1.0] if text.rstrip().endswith("B") else [1.0, 0.0])

    def admit(self, path: Path) -> None: ...


def per(package: Package, granularity: str, **changes: object) -> Package:
    router = package.manifest.router
    assert router is not None
    spec = msgspec.structs.replace(router.spec, granularity=granularity, **changes)
    manifest = msgspec.structs.replace(package.manifest, router=msgspec.structs.replace(router, spec=spec))
    return Package(package.path, manifest)


def test_the_router_reads_again_at_the_first_token_of_every_sentence(opened: Package) -> None:
    session = Routed(b"It is 3.14. Beta now!\nB says so? B ends.")
    chat = Chat(per(opened, "sentence"), session)
    chat.start("Q", None)
    text = "".join(chat.stream(100))
    assert text == "It is 3.14. Beta now!\nB says so? B ends."
    assert session.read == ["Q", "QIt is 3.14. ", "QIt is 3.14. Beta now!\n", "QIt is 3.14. Beta now!\nB says so? "]
    assert [(part.token, dict(part.mix)) for part in chat.sentences] == [
        (0, ALPHA), (12, ALPHA), (22, ALPHA), (33, ALPHA)
    ]  # fmt: skip
    assert [fed for _, fed in session.fed] == ["Q", *text], "the same adapters keep the cache"


def test_other_adapters_in_mid_answer_read_the_whole_history_again(opened: Package) -> None:
    session = Routed(b"To B\nand to\non")
    chat = Chat(per(opened, "sentence"), session)
    chat.start("Q", None)
    assert "".join(chat.stream(100)) == "To B\nand to\non"
    changes = [(part.token, ",".join(part.mix), part.prefill) for part in chat.sentences]
    assert changes == [(0, "alpha", 1), (5, "beta", len("QTo B\n")), (12, "alpha", len("QTo B\nand to\n"))]
    assert session.fed[5] == ("beta", "QTo B\n"), "no position of the cache is alpha's"
    assert session.fed[12] == ("alpha", "QTo B\nand to\n")
    assert all(len(fed) == 1 for index, (_, fed) in enumerate(session.fed) if index not in (5, 12))


def test_a_sentence_under_new_adapters_is_what_they_write_alone(
    opened: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the real session: every token is the arg max of a fresh one that read the whole history under its mix."""
    chat = Chat(per(opened, "sentence"), session_of(opened))
    monkeypatch.setattr(generation, "_END", re.compile("."))  # every character ends a sentence
    turns = itertools.cycle([ALPHA, BETA, BETA, {"alpha": 0.5, "beta": 0.5}])
    monkeypatch.setattr(chat, "route", lambda text: dict(next(turns)))
    chat.start("one two", None)
    list(chat.stream(24))
    expected = list(b"one two")
    for token in range(len(chat.history) - 7):
        mix = [part.mix for part in chat.sentences if part.token <= token][-1]
        expected += greedy(opened, expected, mix, 1)
    assert chat.history == expected and len({tuple(part.mix) for part in chat.sentences}) == 3


def test_a_router_per_prompt_is_asked_once(opened: Package) -> None:
    session = Routed(b"One. Two. Three.")
    chat = Chat(per(opened, "prompt"), session)
    chat.start("Q", None)
    list(chat.stream(100))
    assert session.read == ["Q"] and chat.sentences == []


def test_named_adapters_are_not_routed_away(opened: Package) -> None:
    session = Routed(b"One. Two. Three.")
    chat = Chat(per(opened, "sentence"), session)
    chat.start("Q", BETA)
    list(chat.stream(100))
    assert session.read == [] and {adapter for adapter, _ in session.fed} == {"beta"}


def test_a_task_id_router_reads_the_task_and_not_the_prompt(opened: Package, tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"sum": 0, "sort": 1}, "unk_token": "sum"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    package = per(opened, "sentence", kind="task_id", selection=None)
    assert package.manifest.router is not None
    router = msgspec.structs.replace(package.manifest.router, tokenizer=str(tmp_path / "tokenizer.json"))
    package = Package(package.path, msgspec.structs.replace(package.manifest, router=router))

    class ById(Routed):
        def route(self, ids: Sequence[int]) -> np.ndarray:
            return np.eye(2)[ids[0]]

    chat = Chat(package, ById(b"One. Two."))
    assert chat.start("Q", None, "sort").mix == BETA
    list(chat.stream(100))
    assert chat.start("Q", None, "sum").mix == ALPHA
    with pytest.raises(PackageError, match="--task: name: expected the task that the router goes by, found nothing"):
        chat.start("Q", None)
    with pytest.raises(PackageError, match="task: expected one of sum, sort, found 'else'"):
        chat.start("Q", None, "else")


# ── limits ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [256, 300])
def test_a_prompt_as_long_as_the_context_is_refused(chat: Chat, length: int) -> None:
    with pytest.raises(PackageError, match=f"--prompt: tokens: expected less than .* 256, found {length}"):
        chat.start("x" * length, {})


def test_an_answer_ends_with_the_context(chat: Chat) -> None:
    turn = chat.start("x" * 250, {})
    list(chat.stream(100))
    assert turn.prefill == 250 and len(chat.history) <= 256
    with pytest.raises(PackageError, match="context"):
        chat.start("more text", {})


def test_a_prompt_without_tokens_is_refused(chat: Chat) -> None:
    with pytest.raises(PackageError, match="--prompt: text: expected at least one token, found none"):
        chat.start("", {})


# ── pieces of text ──────────────────────────────────────────────────────────────────────────────────


class Scripted:
    """Says the bytes of a text, which the tiny tokenizer takes for tokens, and then the end token."""

    def __init__(self, data: bytes) -> None:
        self.rest = [*data, 0]

    mix: Mix = {}

    def select(self, mix: Mix, *, keep_cache: bool = False) -> None: ...

    def forget(self) -> None: ...

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        return np.eye(256)[[self.rest.pop(0)]]

    def route(self, ids: Sequence[int]) -> np.ndarray:
        raise AssertionError

    def admit(self, path: Path) -> None: ...


def pieces(package: Package, data: bytes, limit: int = 100) -> list[str]:
    chat = Chat(package, Scripted(data))
    chat.start("x", {})
    return list(chat.stream(limit))


def test_a_character_of_several_tokens_comes_whole(opened: Package) -> None:
    assert pieces(opened, "aé€😀b".encode()) == ["a", "é", "€", "😀", "b"]


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\N{REPLACEMENT CHARACTER}"), max_size=20))
def test_the_pieces_are_the_text(package: Path, text: str) -> None:
    made = pieces(packages.load(package), text.encode())
    assert "".join(made) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in made)


def test_a_byte_that_never_becomes_a_character_holds_nothing_up(opened: Package) -> None:
    assert "".join(pieces(opened, b"a\xe2(b")) == "a\N{REPLACEMENT CHARACTER}(b"


def test_the_end_token_is_not_shown_and_the_limit_holds(opened: Package) -> None:
    assert pieces(opened, b"abc") == ["a", "b", "c"]
    assert pieces(opened, b"abc", limit=2) == ["a", "b"]


# ── --adapter ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "mix"),
    [
        ("auto", None),
        ("none", {}),
        ("alpha", {"alpha": 1.0}),
        ("alpha=0.7,beta=0.3", {"alpha": 0.7, "beta": 0.3}),
        ("alpha, beta=-1", {"alpha": 1.0, "beta": -1.0}),
        ("alpha=0", {"alpha": 0.0}),
    ],
)
def test_mixes_are_parsed(text: str, mix: dict[str, float] | None) -> None:
    assert generation.parse_mix(text) == mix


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha=x", "--adapter: alpha: expected a finite number after =, found 'x'"),
        ("alpha=", "--adapter: alpha: expected a finite number after =, found ''"),
        ("alpha=nan", "--adapter: alpha: expected a finite number after =, found 'nan'"),
        ("alpha=inf", "--adapter: alpha: expected a finite number after =, found 'inf'"),
        ("alpha,alpha=0.5", "--adapter: alpha: expected each adapter once, found it twice"),
    ],
)
def test_a_wrong_mix_is_one_line(text: str, message: str) -> None:
    with pytest.raises(CaloraError) as caught:
        generation.parse_mix(text)
    assert str(caught.value) == message
