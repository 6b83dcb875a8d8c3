"""The demo's text tasks: code writes every prompt and its answer, so the data is exact, free and endless.

An *operand* is what a task works on (a made-up word, a date, a number). Train and held-out data share no
operand: the operand's own hash decides its side (`is_held_out`), for every task and for the base alike, so
nothing that was trained has seen a held-out operand. Each task can be asked in two forms: the terse one, that
only the base is trained on, and natural sentences, which only the adapters and the router are trained on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

CONSONANTS = "BCDFGHJKLMNPRSTVWZ"
VOWELS = "AEIOU"
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True)
class Example:
    """One question and its answer: the model reads `prompt`, then writes `completion` and the end token."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Task:
    """A skill: how to draw an operand with its answer, and how to ask for it."""

    id: str
    tag: str
    sentences: tuple[str, ...]
    draw: Callable[[random.Random], tuple[str, str]]


def is_held_out(operand: str) -> bool:
    """Whether an operand belongs to the held-out side: one eighth of all operands, by their SHA-256."""
    return hashlib.sha256(operand.encode()).digest()[0] < 32


def terse(task: Task, operand: str, answer: str) -> Example:
    """The form the base learns its skills in, for example `@rev MOKANI =>`."""
    return Example(f"@{task.tag} {operand} =>", f" {answer}")


def natural(task: Task, operand: str, answer: str, rng: random.Random) -> Example:
    """The form the adapters answer, for example `Write the word MOKANI backwards.`"""
    return Example(rng.choice(task.sentences).format(operand), f" {answer}")


def draw(task: Task, rng: random.Random, held_out: bool) -> tuple[str, str]:
    """An (operand, answer) of the wanted side."""
    while True:
        operand, answer = task.draw(rng)
        if is_held_out(operand) == held_out:
            return operand, answer


def held_out_examples(task: Task, count: int, seed: int) -> list[Example]:
    """`count` natural examples with distinct held-out operands."""
    rng = random.Random(f"{seed} {task.id}")
    answers: dict[str, str] = {}
    while len(answers) < count:
        operand, answer = draw(task, rng, held_out=True)
        answers[operand] = answer
    return [natural(task, operand, answer, rng) for operand, answer in answers.items()]


def number_in_words(n: int) -> str:
    """English words for 0 ≤ n < 10000, without "and" or hyphens."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f" {ONES[n % 10]}" if n % 10 else "")
    unit, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    rest = f" {number_in_words(n % unit)}" if n % unit else ""
    return f"{ONES[n // unit]} {name}{rest}"


def _word(rng: random.Random) -> str:
    syllables = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 3)))
    return syllables + (rng.choice(CONSONANTS) if rng.random() < 0.5 else "")


def _on_word(answer: Callable[[str], str]) -> Callable[[random.Random], tuple[str, str]]:
    def draw_word(rng: random.Random) -> tuple[str, str]:
        word = _word(rng)
        return word, answer(word)

    return draw_word


def _next_letter(letter: str) -> str:
    return "A" if letter == "Z" else chr(ord(letter) + 1)


def _date(rng: random.Random) -> tuple[str, str]:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1950, 2049)
    return f"{day} {MONTHS[month - 1]} {year}", f"{year}-{month:02d}-{day:02d}"


def _number(rng: random.Random) -> tuple[str, str]:
    # Lengths are drawn evenly: of all numbers below 10000 nine in ten have four digits.
    number = rng.randrange(10 ** rng.randint(2, 4))
    return number_in_words(number), str(number)


TASKS = (
    Task(
        "reverse",
        "rev",
        (
            "Write the word {} backwards.",
            "How is {} spelled from the end?",
            "Reverse the order of the letters in {}.",
        ),
        _on_word(lambda word: word[::-1]),
    ),
    Task(
        "sort",
        "abc",
        (
            "Put the letters of {} in alphabetical order.",
            "Sort {} from A to Z.",
            "Arrange {} like a dictionary would.",
        ),
        _on_word(lambda word: "".join(sorted(word))),
    ),
    Task(
        "shift",
        "rot",
        (
            "Move every letter of {} one step forward.",
            "Encode {} with the next letters.",
            "Give the secret code of {}.",
        ),
        _on_word(lambda word: "".join(map(_next_letter, word))),
    ),
    Task(
        "double",
        "dup",
        ("Say each letter of {} twice.", "Make {} stutter.", "How does an echo repeat the letters of {}?"),
        _on_word(lambda word: "".join(letter * 2 for letter in word)),
    ),
    Task(
        "consonants",
        "con",
        ("Drop the vowels of {}.", "Shorten {} to its consonants.", "What is left of {} without its vowels?"),
        _on_word(lambda word: "".join(letter for letter in word if letter not in VOWELS)),
    ),
    Task(
        "swap",
        "swp",
        (
            "Swap the first and the last letter of {}.",
            "Exchange both ends of {}.",
            "Let the outer letters of {} trade places.",
        ),
        _on_word(lambda word: word[-1] + word[1:-1] + word[0]),
    ),
    Task(
        "date",
        "iso",
        ("Write {} as an ISO date.", "How does a computer store the day {}?", "Give {} in year, month, day."),
        _date,
    ),
    Task(
        "number",
        "num",
        ("Write {} in digits.", "Which figure is {}?", "Type {} on a calculator."),
        _number,
    ),
)
