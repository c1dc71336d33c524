"""Near-duplicates among tasks: the same exercise twice, or one exercise with a detail changed.

In: tasks. Out: pairs with two similarities, each in 0..1. Nothing is executed.

* Words: Jaccard similarity of the words and word pairs of the statements' first sentences. Boilerplate ("write a
  function that returns") is dropped, numbers are kept, synonyms and plurals are folded, and each word weighs as much
  as it is rare among the tasks compared (idf), word pairs less than words.
* Code: Jaccard similarity of the runs of 3 and 4 tokens of the references after their own names were replaced in order
  of appearance and docstrings, annotations and imports were dropped.

A pair is reported if the words nearly agree, if words and code agree well enough together (`BARS`), if a short
statement says nothing that a long one does not and the code agrees (`CONTAINED`), or if the programs are the same and
either they call something or the words agree a little.
The bars were set by eye on MBPP, train against test: of the 60 pairs reported, 55 are the same exercise or the same
with one detail changed.
It does not see two exercises that share neither words nor program, and it takes exercises for one whose difference is
a single word ("first", "last") in otherwise equal sentences with similar programs.
"""

import ast
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from greenloop.tasks import syntax
from greenloop.types import Task, TaskSet

BARS = ((0.80, 0.00), (0.60, 0.40), (0.45, 0.60), (0.30, 0.75))
"""(words, code): a pair that reaches both numbers of one row is reported."""
CONTAINED = (0.95, 0.40)
"""(words, code) where the words are the share of the poorer statement's weight that the richer one holds too."""
CONTAINED_WORDS = 3
"""How many words they must share for that."""
SAME_PROGRAM_WORDS = 0.20
"""What the words of two equal programs must reach if these call nothing, as `return a * b`."""
PAIR_WEIGHT = 0.50
"""Weight of a pair of neighbouring words, as a fraction of its words' mean; it tells "A to B" from "B to A"."""

_BOILERPLATE_TEXT = """
a an and any are as at be by calculate can check compute each every find following for from function get given has have
how if in into is it its lambda let may must of on one or otherwise provided python regex return returns so specified
such take takes than that the then there these this those to true false use using was where whether which with write
"""
_BOILERPLATE = frozenset(_BOILERPLATE_TEXT.split())
_SYNONYMS = {
    word: group.split()[0]
    for group in (
        "largest biggest greatest highest max maximum",
        "smallest least lowest min minimum",
        "list array sequence",
        "number int integer num",
        "character char letter",
        "element entry item value",
        "dictionary dict",
        "occurrence occur occurence",
        "sum add addition total",
        "remove delete drop",
        "count amount",
        "string sentence text",
    )
    for word in group.split()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NearDuplicate:
    """Two tasks that look like one exercise."""

    left: Task
    right: Task
    words: float
    """Similarity of the statements, 0..1."""
    code: float
    """Similarity of the references, 0..1; 0 if one of them is missing."""
    same_program: bool
    """The references are equal but for their own names."""

    @property
    def crosses_splits(self) -> bool:
        """The tasks lie in different splits: what one teaches, the other would measure."""
        return self.left.split != self.right.split


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """The near-duplicates that concern one task set."""

    spec: str
    across_splits: tuple[NearDuplicate, ...]
    within_splits: tuple[NearDuplicate, ...]
    against: str
    """Spec of the other set, or empty."""
    with_other: tuple[NearDuplicate, ...]
    """Pairs of a task of the set (left) and one of the other set (right)."""


@dataclass(frozen=True, slots=True)
class _Fingerprint:
    task: Task
    words: tuple[str, ...]
    program: str
    """The reference in canonical form, or empty."""
    calls: bool
    shingles: frozenset[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class _Weighed:
    weights: Mapping[str, float]
    """Of each word and each word pair of a statement."""
    total: float
    words_total: float
    """Of the words alone."""


@dataclass(frozen=True, slots=True)
class _Overlap:
    similarity: float
    """Jaccard, words and word pairs."""
    containment: float
    """Of the poorer statement's words in the richer one's."""
    shared_words: int


def audit(task_set: TaskSet, against: TaskSet | None = None) -> AuditReport:
    """All near-duplicates within the set and, if given, with another set; the most alike first."""
    pairs = near_duplicates(task_set.tasks)
    return AuditReport(
        spec=task_set.spec,
        across_splits=tuple(pair for pair in pairs if pair.crosses_splits),
        within_splits=tuple(pair for pair in pairs if not pair.crosses_splits),
        against=against.spec if against else "",
        with_other=near_duplicates(task_set.tasks, against.tasks) if against else (),
    )


def near_duplicates(left: Sequence[Task], right: Sequence[Task] | None = None) -> tuple[NearDuplicate, ...]:
    """Near-duplicates between two lists of tasks, or within one; the most alike first.

    Compares every pair (1000 by 500 tasks: about 5 s).
    """
    lefts = [_fingerprint(task) for task in left]
    rights = [_fingerprint(task) for task in right] if right is not None else lefts
    rarity = _rarity((*lefts, *rights) if right is not None else lefts)
    weighed_lefts, weighed_rights = ([_weighed(print_.words, rarity) for print_ in side] for side in (lefts, rights))
    found = []
    for i, j in _index_pairs(len(lefts), None if right is None else len(rights)):
        overlap = _overlap(weighed_lefts[i], weighed_rights[j])
        if pair := _judged(lefts[i], rights[j], overlap):
            found.append(pair)
    return tuple(sorted(found, key=lambda pair: (-pair.words - pair.code, pair.left.task_id, pair.right.task_id)))


def _index_pairs(lefts: int, rights: int | None) -> Iterator[tuple[int, int]]:
    """All pairs of two lists, or each pair of one list once."""
    for i in range(lefts):
        for j in range(i + 1, lefts) if rights is None else range(rights):
            yield i, j


def _judged(left: _Fingerprint, right: _Fingerprint, overlap: _Overlap) -> NearDuplicate | None:
    """The pair if it is to be reported."""
    same = bool(left.program) and left.program == right.program
    contained = overlap.shared_words >= CONTAINED_WORDS and overlap.containment >= CONTAINED[0]
    if not (same or contained or overlap.similarity >= BARS[-1][0]):
        return None
    code = _jaccard(left.shingles, right.shingles)
    alike = any(overlap.similarity >= words_bar and code >= code_bar for words_bar, code_bar in BARS)
    same_task = same and (left.calls or overlap.similarity >= SAME_PROGRAM_WORDS)
    if not (alike or same_task or (contained and code >= CONTAINED[1])):
        return None
    return NearDuplicate(left=left.task, right=right.task, words=overlap.similarity, code=code, same_program=same)


def _fingerprint(task: Task) -> _Fingerprint:
    tree = _canonical(task.reference)
    program = ast.unparse(tree)
    tokens = re.findall(r"\w+|[^\w\s]", program)
    shingles = frozenset(tuple(tokens[i : i + n]) for n in (3, 4) for i in range(len(tokens) - n + 1))
    calls = any(isinstance(node, ast.Call) for node in ast.walk(tree))
    return _Fingerprint(task, statement_words(task), program, calls, shingles)


def statement_words(task: Task) -> tuple[str, ...]:
    """The telling words of the statement's first sentence, in order.

    >>> statement_words(Task(task_id="t", entry_point="top", tests=(), statement="Write a function `top(xs)` that "
    ... "returns the 3 highest numbers of the array `xs`. An empty list gives []."))
    ('top', 'xs', '3', 'largest', 'number', 'list', 'xs')
    """
    text = task.statement.strip().removeprefix(task.prelude).partition(">>>")[0]
    sentence = re.split(r"(?<=[\w)`'\"\]])\.\s+(?=[A-Z`])", text.strip())[0]
    words = (_stem(word) for word in re.findall(r"[a-z]+|\d+", sentence.lower()))
    return tuple(word for word in words if word not in _BOILERPLATE and (len(word) > 1 or word.isdigit()))


def _stem(word: str) -> str:
    singular = word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
    return _SYNONYMS.get(singular, singular)


def _rarity(prints: Iterable[_Fingerprint]) -> dict[str, float]:
    """Weight of each word, above 0: ln((tasks + 1) / tasks with the word)."""
    texts = [set(print_.words) for print_ in prints]
    occurrences = Counter(word for text in texts for word in text)
    return {word: math.log((len(texts) + 1) / count) for word, count in occurrences.items()}


def _weighed(words: tuple[str, ...], rarity: Mapping[str, float]) -> _Weighed:
    weights = {word: rarity[word] for word in words}
    words_total = sum(weights.values())
    for first, second in pairwise(words):
        weights[f"{first} {second}"] = PAIR_WEIGHT * (rarity[first] + rarity[second]) / 2
    return _Weighed(weights, sum(weights.values()), words_total)


def _overlap(left: _Weighed, right: _Weighed) -> _Overlap:
    common = left.weights.keys() & right.weights.keys()
    shared = sum(left.weights[word] for word in common)
    words = [word for word in common if " " not in word]
    poorer = min(left.words_total, right.words_total)
    union = left.total + right.total - shared
    return _Overlap(
        similarity=shared / union if union else 0.0,
        containment=sum(left.weights[word] for word in words) / poorer if poorer else 0.0,
        shared_words=len(words),
    )


def _jaccard(left: frozenset[tuple[str, ...]], right: frozenset[tuple[str, ...]]) -> float:
    shared = len(left & right)
    union = len(left) + len(right) - shared
    return shared / union if union else 0.0


def _canonical(source: str) -> ast.Module:
    """The program with its own names replaced in order of appearance; docstrings, annotations and imports dropped."""
    tree = syntax.parse(source)
    canonical = _Canonical(syntax.bound_names(tree)).visit(tree)
    assert isinstance(canonical, ast.Module)
    return ast.fix_missing_locations(canonical)


class _Canonical(ast.NodeTransformer):
    """Replaces the names in `own` by `v0`, `v1` ... and drops what does not run."""

    def __init__(self, own: frozenset[str]) -> None:
        self._own = own
        self._renamed: dict[str, str] = {}

    def _name(self, name: str) -> str:
        return self._renamed.setdefault(name, f"v{len(self._renamed)}") if name in self._own else name

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name, node.returns = self._name(node.name), None
        return self._without_docstring(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.name = self._name(node.name)
        return self._without_docstring(node)

    def visit_Module(self, node: ast.Module) -> ast.AST:
        imports = (ast.Import, ast.ImportFrom)
        node.body = [statement for statement in node.body if not isinstance(statement, imports)]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.arg, node.annotation = self._name(node.arg), None
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self._name(node.id)
        return node

    def _without_docstring(self, node: ast.FunctionDef | ast.ClassDef) -> ast.AST:
        match node.body:
            case [ast.Expr(value=ast.Constant(value=str())), *rest]:
                node.body = rest or [ast.Pass()]
        return self.generic_visit(node)
