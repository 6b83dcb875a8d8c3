"""The text tasks: same seed, same data; right answers; no operand on both sides."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime

import pytest

from calora_export.demo.tasks import TASKS, Task, draw, held_out_examples, natural, number_in_words, terse

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BY_ID = {task.id: task for task in TASKS}
each_task = pytest.mark.parametrize("task", TASKS, ids=BY_ID.get)


def operands(task: Task, count: int, held_out: bool) -> set[str]:
    rng = random.Random(f"{task.id} {held_out}")
    return {draw(task, rng, held_out)[0] for _ in range(count)}


def test_there_are_at_least_eight_tasks_of_different_names() -> None:
    assert len(BY_ID) == len({task.tag for task in TASKS}) == len(TASKS) >= 8


@each_task
def test_the_same_seed_draws_the_same_examples(task: Task) -> None:
    first, second, other = (
        [natural(task, *draw(task, rng, held_out=False), rng) for _ in range(20)]
        for rng in map(random.Random, (7, 7, 8))
    )
    assert first == second != other
    assert held_out_examples(task, 20, seed=7) == held_out_examples(task, 20, seed=7) != held_out_examples(task, 20, 8)


def test_no_operand_is_both_trained_on_and_held_out() -> None:
    trained = set().union(*(operands(task, 3000, held_out=False) for task in TASKS))
    held_out = set().union(*(operands(task, 500, held_out=True) for task in TASKS))
    assert min(len(trained), len(held_out)) > 500
    assert trained & held_out == set()


@each_task
def test_held_out_prompts_are_never_drawn_for_training(task: Task) -> None:
    held_out = held_out_examples(task, 100, seed=2024)
    trained = operands(task, 3000, held_out=False)
    prompts = {sentence.format(operand) for sentence in task.sentences for operand in trained}
    assert len({example.prompt for example in held_out}) == len(held_out) == 100
    assert prompts & {example.prompt for example in held_out} == set()


def test_the_two_forms_of_a_question() -> None:
    task = BY_ID["reverse"]
    assert terse(task, "MOKANI", "INAKOM").prompt == "@rev MOKANI =>"
    asked = {natural(task, "MOKANI", "INAKOM", random.Random(seed)).prompt for seed in range(20)}
    assert asked == {sentence.format("MOKANI") for sentence in task.sentences}


@pytest.mark.parametrize(
    ("task", "answer_of"),
    [
        ("reverse", lambda word: "".join(reversed(word))),
        ("sort", lambda word: "".join(chr(code) for code in sorted(word.encode()))),
        ("shift", lambda word: word.translate(str.maketrans(LETTERS, LETTERS[1:] + "A"))),
        ("double", lambda word: "".join(a + b for a, b in zip(word, word, strict=True))),
        ("consonants", lambda word: word.translate(str.maketrans("", "", "AEIOU"))),
        ("swap", lambda word: f"{word[-1]}{word[1:-1]}{word[0]}"),
        ("date", lambda date: datetime.strptime(date, "%d %B %Y").date().isoformat()),
    ],
)
def test_answers_are_right(task: str, answer_of: Callable[[str], str]) -> None:
    rng = random.Random(1)
    for _ in range(200):
        operand, answer = BY_ID[task].draw(rng)
        assert answer == answer_of(operand)


def test_numbers_in_words() -> None:
    known = {
        0: "zero", 13: "thirteen", 20: "twenty", 42: "forty two", 100: "one hundred", 720: "seven hundred twenty",
        1000: "one thousand", 2019: "two thousand nineteen", 9999: "nine thousand nine hundred ninety nine",
    }  # fmt: skip
    assert {n: number_in_words(n) for n in known} == known
    assert len({number_in_words(n) for n in range(10000)}) == 10000
    rng = random.Random(1)
    for _ in range(200):
        operand, answer = BY_ID["number"].draw(rng)
        assert operand == number_in_words(int(answer))
