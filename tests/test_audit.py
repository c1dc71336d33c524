"""Near-duplicates: what counts as the same exercise, hand-made and on MBPP."""

import math
import time
from pathlib import Path

import pytest

from greenloop.tasks import load_tasks
from greenloop.tasks.audit import audit, near_duplicates, statement_words
from greenloop.tasks.content import task_set
from greenloop.types import Task


def task(name: str, statement: str, reference: str = "", split: str = "train", prelude: str = "") -> Task:
    return Task(
        task_id=name,
        statement=statement,
        entry_point="f",
        tests=("assert f()",),
        reference=reference,
        split=split,
        prelude=prelude,
    )


FILLER = [
    task(
        "w", "Write a function to reverse the words of a sentence.", "def f(s):\n    return ' '.join(s.split()[::-1])"
    ),
    task(
        "p",
        "Check whether a year is a leap year.",
        "def f(y):\n    return y % 4 == 0 and (y % 100 != 0 or y % 400 == 0)",
    ),
    task(
        "q", "Count vowels in a poem.", "def f(s):\n    n = 0\n    for c in s:\n        n += c in 'aeiou'\n    return n"
    ),
]


def ids(left: Task, right: Task) -> list[tuple[str, str]]:
    return [(pair.left.task_id, pair.right.task_id) for pair in near_duplicates([left, *FILLER], [right])]


def test_boilerplate_plurals_and_synonyms_do_not_tell_statements_apart() -> None:
    left = task("a", "Write a python function to find the maximum of two integers.")
    right = task("b", "Write a function that returns the largest of the two given numbers. Ties do not matter.")
    assert statement_words(left) == statement_words(right) == ("largest", "two", "number")
    assert ids(left, right) == [("a", "b")]


def test_numbers_are_kept_as_words() -> None:
    assert statement_words(task("a", "Check if the month has 31 days.")) == ("month", "31", "day")


def test_the_words_of_a_signature_come_without_what_the_data_set_put_before_it() -> None:
    prompt = 'import math\n\ndef area(r):\n    """ Area of a circle.\n    >>> area(1)\n    """\n'
    words = statement_words(task("a", prompt, prelude="import math"))
    assert words == ("def", "area", "area", "circle")


def test_order_of_words_matters() -> None:
    left = task("a", "Convert degrees to radians.", "def f(x):\n    return x * 3.14 / 180")
    right = task("b", "Convert radians to degrees.", "def f(x):\n    return x / 3.14 * 180 + 0")
    (same,) = near_duplicates([left], [left])
    assert same.words == pytest.approx(1)
    assert ids(left, right) == []


def test_renamed_documented_and_annotated_programs_are_the_same_program() -> None:
    left = task("a", "Order the guests.", "def guests(names):\n    return sorted(names, key=len)")
    right = task(
        "b",
        "Which parcels come first?",
        "import math\n\n"
        "def parcels(sizes: list[str]) -> list[str]:\n    '''Short ones.'''\n    return sorted(sizes, key=len)",
    )
    (pair,) = near_duplicates([left, *FILLER], [right])
    assert (pair.same_program, pair.code) == (True, 1.0)


def test_equal_programs_that_call_nothing_need_some_words_in_common() -> None:
    left = task("a", "Area of a parallelogram with base b and height h.", "def area(b, h):\n    return b * h")
    far = task("b", "Salary after n hours.", "def pay(n, rate):\n    return n * rate")
    near = task("c", "Area of a rectangle with its base and height.", "def rect(x, y):\n    return x * y")
    assert ids(left, far) == []
    assert ids(left, near) == [("a", "c")]


def test_other_constants_are_another_program() -> None:
    left = task("a", "Price with tax.", "def f(x):\n    return round(x * 1.2)")
    right = task("b", "Feet of a height.", "def g(y):\n    return round(y * 3.3)")
    assert ids(left, right) == []


def test_a_short_statement_inside_a_long_one_counts_only_with_similar_code() -> None:
    code = "def f(s):\n    parts = s.split(' ')\n    return ' '.join(reversed(parts))"
    short = task("a", "Reverse words of a string.", code)
    text = "Turn a polite string around: reverse its words so that the guest who came last is greeted before the host."
    assert ids(short, task("b", text, code.replace("parts", "words"))) == [("a", "b")]
    assert ids(short, task("c", text, code.replace("parts = s", "parts = s.strip()"))) == [("a", "c")]
    assert (
        ids(short, task("d", text, "def f(s):\n    out = []\n    while s:\n        out += s.pop()\n    return out"))
        == []
    )


def test_tasks_without_reference_are_compared_by_their_words_alone() -> None:
    left, right = task("a", "Merge two dictionaries."), task("b", "Split a bill among friends.")
    assert ids(left, right) == []
    (pair,) = near_duplicates([left, *FILLER], [left])
    assert (pair.words, pair.code, pair.same_program) == (pytest.approx(1), 0.0, False)


def test_pairs_within_one_list_come_once_and_never_with_themselves() -> None:
    twins = [task(name, "Count the rainy days.", split=split) for name, split in (("a", "train"), ("b", "test"))]
    pairs = near_duplicates([*twins, *FILLER])
    assert [(pair.left.task_id, pair.right.task_id) for pair in pairs] == [("a", "b")]


def test_words_weigh_by_rarity_and_word_pairs_half_of_that() -> None:
    code = "def f():\n    return sorted([2, 1])"
    rows = [task("a", "Red apple.", code), task("b", "Red pear."), task("c", "Blue plum.")]
    (pair,) = near_duplicates([task("x", "Red fig.", code)], rows)
    # "red" is in 3 of the 4 statements, each other word in one; each pair of words has half the mean of its words.
    red, other = math.log(5 / 3), math.log(5 / 1)
    red_other = 0.5 * (red + other) / 2
    assert pair.words == pytest.approx(red / (red + 2 * other + 2 * red_other))


def test_the_audit_separates_across_splits_within_a_split_and_the_other_set() -> None:
    tasks = [
        task("a", "Count the rainy days."),
        task("b", "Count rainy days.", split="test"),
        task("c", "Find the tallest tree."),
        task("d", "Get the tallest tree."),
        *FILLER,
    ]
    other = task_set("other", [task("z", "Compute the tallest tree.")], source="")
    report = audit(task_set("own", tasks, source=""), other)
    assert [(p.left.task_id, p.right.task_id) for p in report.across_splits] == [("a", "b")]
    assert [(p.left.task_id, p.right.task_id) for p in report.within_splits] == [("c", "d")]
    assert [(p.left.task_id, p.right.task_id) for p in report.with_other] == [("c", "z"), ("d", "z")]
    assert (report.spec, report.against) == ("own", "other")


def test_mbpp_repeats_itself_between_train_and_test_and_unlike_tasks_are_left_alone(data_dir: Path) -> None:
    train, test = (load_tasks(f"mbpp:{split}", data_dir=data_dir).tasks for split in ("train", "test"))
    started = time.perf_counter()
    pairs = near_duplicates(train, test)
    elapsed_s = time.perf_counter() - started
    found = {(pair.left.task_id.removeprefix("mbpp/"), pair.right.task_id.removeprefix("mbpp/")) for pair in pairs}
    repeats = {("800", "451"), ("658", "362"), ("928", "427"), ("841", "296"), ("842", "29"), ("602", "217")}
    siblings = {("793", "195"), ("807", "221"), ("964", "79")}
    strangers = {("965", "102"), ("731", "266"), ("789", "52"), ("703", "405")}
    assert repeats | siblings <= found
    assert not strangers & found
    assert 45 <= len(found) <= 75
    assert elapsed_s < 20


def test_no_starter_test_task_repeats_a_train_task() -> None:
    report = audit(load_tasks("starter"))
    assert [(pair.left.task_id, pair.right.task_id) for pair in report.across_splits] == []
