"""The program in a completion's text.

In: the text that a model wrote. Out: Python source, or None if the text holds no program. Nothing is ever executed; the
only judge of syntax is `ast.parse`, under a budget of characters, so that hostile text costs a bounded time.

What it does not guarantee: the program may be wrong, and a closed code block that does not parse is handed on as it is,
because a syntax error is the model's answer and not ours to repair. While parsing, the process-wide warning filters are
changed and restored: call from one thread at a time.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from textwrap import dedent

PYTHON_LABELS = frozenset({"python", "python3", "py", "py3"})

_PARSE_BUDGET = 60_000
_MARKER = re.compile(r"`{3,}|~{3,}")
_LIST_ITEM = re.compile(r"[ \t]*(?:[-*+>]|\d+[.)])?[ \t]*")
_INLINE = re.compile(r"[ \t]*(?P<marker>`{3,})(?P<code>[^`]+)(?P=marker)[ \t]*")
_BLOCK = re.compile(r"```(?:\w+[ \t]*)?\n(.*?)\n?```", re.DOTALL)
_DONE = re.compile(r"^[ \t]*\[DONE\][ \t]*$", re.MULTILINE)
_STATEMENT = re.compile(r"(?:(?:import|from|def|class|async|try|if|for|while|with)\b|@|[A-Za-z_]\w*[ \t]*(?::[^=]+)?=)")
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True, slots=True)
class Fence:
    """One Markdown code block."""

    language: str
    """First word after the opening marker, lower case; may be empty."""
    code: str
    """The lines between the markers, without the indentation of the opening one."""
    closed: bool
    """A proper closing line was there."""

    @property
    def is_python(self) -> bool:
        """Labelled as Python."""
        return self.language in PYTHON_LABELS


@dataclass(slots=True)
class _Parser:
    """`ast.parse` that never raises and stops when its budget of characters is spent."""

    budget: int = _PARSE_BUDGET
    error_line: int = field(default=0, init=False)
    """1-based line of the last failure."""

    def parse(self, source: str) -> ast.Module | None:
        """The syntax tree, or None: no Python, or the budget does not cover it."""
        self.budget -= len(source) + 64
        if self.budget < 0:
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(source)
        except SyntaxError as error:
            self.error_line = error.lineno or _line_of_fault(source)
        except (ValueError, RecursionError, MemoryError, OverflowError):
            self.error_line = _line_of_fault(source)
        return None

    @property
    def spent(self) -> bool:
        """Nothing more will be parsed."""
        return self.budget < 0


def _line_of_fault(source: str) -> int:
    """A line to cut at where the parser names none: the first null byte's, else the middle."""
    null = source.find("\0")
    return (source.count("\n", 0, null) if null >= 0 else source.count("\n") // 2) + 1


def extract_code(text: str, entry_point: str = "") -> str | None:
    r"""The program in a chat answer; None if there is none.

    In this order:

    1. the first code block that parses and defines `entry_point` (without an entry point: any function or class),
       preceded by those earlier blocks that hold nothing but imports, definitions and assignments (helpers); blocks are
       never joined otherwise;
    2. the first block that means to define it but does not parse: as it is if it was closed; if the answer broke off,
       without the unfinished statements after the definition;
    3. the longest parsable run of lines outside blocks that defines it;
    4. the first block labelled Python, or unlabelled and parsable;
    5. the longest parsable run of lines that defines anything at all.

    Text after a line `[DONE]` is ignored.

    >>> extract_code("Sure!\n```python\ndef f(x):\n    return x\n```\nIt returns x.", "f")
    'def f(x):\n    return x\n'
    >>> extract_code("def f(x):\n    return x\n\nIt returns x.", "f")
    'def f(x):\n    return x\n'
    >>> extract_code("I cannot do that.", "f") is None
    True
    """
    text = _answer(text)
    parser = _Parser()
    fences = tuple(fence for fence in find_fences(text) if fence.code.strip())
    return _finished(
        _defining_block(fences, entry_point, parser)
        or _broken_block(fences, entry_point, parser)
        or (entry_point and _longest_run(text, entry_point, parser))
        or _any_block(fences, parser)
        or _longest_run(text, "", parser)
    )


def well_formed(text: str, entry_point: str) -> bool:
    r"""Whether the answer has exactly one code block, closed, labelled Python, that parses and defines `entry_point`.

    >>> well_formed("```python\ndef f(): return 1\n```", "f"), well_formed("def f(): return 1", "f")
    (True, False)
    """
    fences = find_fences(_answer(text))
    if len(fences) != 1 or not (fences[0].is_python and fences[0].closed):
        return False
    tree = _Parser().parse(fences[0].code)
    return tree is not None and _defines(tree, entry_point)


def answered(text: str, entry_point: str) -> bool:
    r"""Whether nothing that may follow can change `extract_code`: a closed block parses and defines `entry_point`.

    `text` must end with a whole line, or its last line may yet become another one.

    >>> answered("```python\ndef f(): return 1\n```\n", "f"), answered("```python\ndef f(): return 1\n", "f")
    (True, False)
    """
    parser = _Parser()
    fences = (fence for fence in find_fences(_answer(text)) if fence.closed and fence.code.strip())
    return any((tree := parser.parse(fence.code)) is not None and _defines(tree, entry_point) for fence in fences)


def _answer(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    done = _DONE.search(text)
    return (text[: done.start()] if done else text).rstrip().removesuffix("[DONE]")


def _finished(program: str | None) -> str | None:
    return program.strip("\n") + "\n" if program and program.strip() else None


def find_fences(text: str) -> tuple[Fence, ...]:
    r"""The code blocks of a Markdown text in order, with the liberties that language models take.

    Besides CommonMark's rules (three or more backticks or tildes, the closing marker at least as long): prose may stand
    before an opening marker, code may stand before a closing one (not counted as closed), a marker labelled Python
    inside a block opens the next block, a marker on the line after the opening one opens the same block again, and
    ```` ```code``` ```` on one line is a block (not counted as closed).

    >>> [(f.language, f.code, f.closed) for f in find_fences("~~~Py\nx = 1\n~~~\n```\ny")]
    [('py', 'x = 1', True), ('', 'y', False)]
    """
    return tuple(_scan_fences(text.split("\n")))


@dataclass(frozen=True, slots=True)
class _Opening:
    """The line that opens a code block."""

    marker: str
    info: str
    """What follows the marker."""
    indent: int
    """Columns before the marker."""
    after_prose: bool
    """Something else than white space or a list item's mark stands before it."""


def _opening(line: str) -> _Opening | None:
    found = _MARKER.search(line)
    if found is None:
        return None
    before, info = line[: found.start()], line[found.end() :].strip()
    after_prose = _LIST_ITEM.fullmatch(before) is None
    if "`" in info or (after_prose and info.lower() not in PYTHON_LABELS | {""}):
        return None
    return _Opening(found[0], info, 0 if after_prose else len(before), after_prose)


def _scan_fences(lines: Sequence[str]) -> Iterator[Fence]:
    opening: _Opening | None = None
    body: list[str] = []
    for line in lines:
        if opening is None:
            if inline := _INLINE.fullmatch(line):
                yield _inline_fence(inline["code"])
            opening, body = _opening(line), []
        elif _closes(line.strip(), opening.marker):
            if body:
                yield _fence(opening, body, closed=True)
                opening = None
        elif (following := _opening(line)) and _interrupts(following, opening):
            yield _fence(opening, body, closed=False)
            opening, body = following, []
        elif line.rstrip().endswith(opening.marker):
            yield _fence(opening, [*body, line.rstrip().rstrip(opening.marker[0])], closed=False)
            opening = None
        else:
            body.append(line)
    if opening is not None:
        yield _fence(opening, body, closed=False)


def _closes(line: str, marker: str) -> bool:
    return len(line) >= len(marker) and set(line) == {marker[0]}


def _interrupts(following: _Opening, current: _Opening) -> bool:
    is_python = following.info.lower() in PYTHON_LABELS
    return is_python and not following.after_prose and following.marker.startswith(current.marker)


def _inline_fence(code: str) -> Fence:
    label, _, rest = code.strip().partition(" ")
    return Fence(label.lower(), rest, False) if label.lower() in PYTHON_LABELS else Fence("", code, False)


def _fence(opening: _Opening, body: Sequence[str], *, closed: bool) -> Fence:
    label, _, rest = opening.info.partition(" ")
    first = [rest] if _STATEMENT.match(rest) else []
    lines = [line[min(opening.indent, len(line) - len(line.lstrip())) :] for line in body]
    return Fence(label.lower(), "\n".join([*first, *lines]), closed)


def _defining_block(fences: Sequence[Fence], entry_point: str, parser: _Parser) -> str | None:
    helpers: list[str] = []
    for fence in fences:
        code, tree = _parsed(fence.code, parser)
        if tree is not None and _defines(tree, entry_point):
            return "\n\n".join([*helpers, code])
        if tree is not None and _only_defines(tree) and (fence.is_python or not fence.language):
            helpers.append(code)
    return None


def _broken_block(fences: Sequence[Fence], entry_point: str, parser: _Parser) -> str | None:
    anchor = _anchor(entry_point)
    for fence in fences:
        if anchor.search(fence.code):
            return fence.code if fence.closed else _longest_run(fence.code, entry_point, parser) or fence.code
    return None


def _any_block(fences: Sequence[Fence], parser: _Parser) -> str | None:
    for fence in fences:
        code, tree = _parsed(fence.code, parser)
        if fence.is_python or (not fence.language and tree is not None):
            return code
    return None


def _parsed(code: str, parser: _Parser) -> tuple[str, ast.Module | None]:
    code = dedent(code) if code.lstrip("\n")[:1] in (" ", "\t") else code
    return code, parser.parse(code)


def _defines(tree: ast.Module, entry_point: str) -> bool:
    """A top-level statement binds the name; without a name: defines any function or class."""
    if not entry_point:
        return any(isinstance(node, _DEFINITIONS) for node in tree.body)
    return any(entry_point in _bound_names(node) for node in tree.body)


def _bound_names(node: ast.stmt) -> tuple[str, ...]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return (name,)
        case ast.Assign(targets=targets):
            return tuple(target.id for target in targets if isinstance(target, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
            return (name,)
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            return tuple(alias.asname or alias.name for alias in aliases)
    return ()


def _only_defines(tree: ast.Module) -> bool:
    return all(_bound_names(node) or _is_string(node) for node in tree.body)


def _is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _anchor(entry_point: str) -> re.Pattern[str]:
    """Where a definition of the name starts; without a name: of any function or class."""
    if not entry_point:
        return re.compile(r"^(?P<indent>[ \t]*)(?:async[ \t]+def|def|class)[ \t]+\w+[ \t]*[(:]", re.MULTILINE)
    name = re.escape(entry_point)
    return re.compile(
        rf"^(?P<indent>[ \t]*)(?:(?:async[ \t]+def|def|class)[ \t]+{name}\b|{name}[ \t]*=(?!=))", re.MULTILINE
    )


def _longest_run(text: str, entry_point: str, parser: _Parser) -> str | None:
    """The longest parsable run of whole top-level statements that defines the name, by non-blank lines."""
    lines = text.split("\n")
    best: list[str] = []
    for match in _anchor(entry_point).finditer(text):
        run = _run_around(lines, text.count("\n", 0, match.start()), match["indent"], parser)
        if _size(run) > _size(best):
            best = run
        if parser.spent:
            break
    return "\n".join(best) or None


def _size(lines: Sequence[str]) -> int:
    return sum(bool(line.strip()) for line in lines)


def _run_around(lines: Sequence[str], anchor: int, indent: str, parser: _Parser) -> list[str]:
    first = anchor
    while first > 0 and _belongs(lines[first - 1], indent):
        first -= 1
    last = anchor
    while last < len(lines) and _belongs(lines[last], indent):
        last += 1
    region = [line[len(indent) :] for line in lines[first:last]]
    start = anchor - first
    end = _extend_down(region, start, parser)
    return [] if end is None else region[_extend_up(region, start, end, parser) : end]


def _belongs(line: str, indent: str) -> bool:
    return line.startswith(indent) or not line.strip()


def _extend_down(lines: Sequence[str], start: int, parser: _Parser) -> int | None:
    """The furthest end of statements that parse from `start`; it never cuts into a statement."""
    end = len(lines)
    while end > start and not parser.spent:
        tree = parser.parse("\n".join(lines[start:end]))
        if tree is not None:
            kept = [node.end_lineno or 0 for node in tree.body if not _is_prose(node)]
            return start + max(kept) if kept else None
        end = min(end - 1, start + parser.error_line - 1)
        while end > start and (lines[end][:1] in ("", " ", "\t") or not lines[end].strip()):
            end -= 1
    return None


def _is_prose(node: ast.stmt) -> bool:
    """A statement such as `Done` or `Note: this`, which is Python by accident."""
    if isinstance(node, ast.AnnAssign):
        return node.value is None
    return isinstance(node, ast.Expr) and not any(isinstance(part, ast.Call) for part in ast.walk(node))


def _extend_up(lines: Sequence[str], anchor: int, end: int, parser: _Parser) -> int:
    """The earliest start above `anchor` from which everything up to `end` parses."""
    start = 0
    while start < anchor and not parser.spent:
        if _STATEMENT.match(lines[start]):
            if parser.parse("\n".join(lines[start:end])) is not None:
                return start
            if start + parser.error_line <= anchor:
                start += parser.error_line - 1
        start += 1
    return anchor


def first_fenced_block(text: str) -> str:
    r"""The code of an answer whose opening marker stood in the prompt: up to the first closing marker, or all of it.

    An answer that starts with a block of its own is read from there.

    >>> first_fenced_block("def f():\n    pass\n```\nThis does nothing.")
    'def f():\n    pass'
    """
    block = _BLOCK.match(text.lstrip()) or _BLOCK.search("```\n" + text)
    return block[1] if block else text


def longest_valid_span(text: str) -> str | None:
    r"""The lines, from any to any, that parse as Python and hold the most non-blank ones; None if no line does.

    >>> longest_valid_span("Here you are:\nimport re\n\nx = 1\nIt is one.")
    'import re\n\nx = 1'
    """
    lines = text.split("\n")
    parser = _Parser()
    best: Sequence[str] = ()
    best_size, remaining = 0, _size(lines)
    for start, line in enumerate(lines):
        if remaining <= best_size or parser.spent:
            break
        if line.strip():
            indented = line[0] in " \t" and line.lstrip()[0] != "#"
            span = () if indented else _longest_prefix(lines[start:], parser)
            if _size(span) > best_size:
                best, best_size = span, _size(span)
            remaining -= 1
    return "\n".join(best) or None


def _longest_prefix(lines: Sequence[str], parser: _Parser) -> Sequence[str]:
    end = len(lines)
    while end > 0 and not parser.spent:
        if parser.parse("\n".join(lines[:end])) is not None:
            return lines[:end]
        end = min(end - 1, parser.error_line - 1)
    return ()


def reachable_program(source: str, entry_point: str) -> str | None:
    r"""Only the imports and those top-level definitions that the entry point reaches by name; None if nothing is left.

    As evalplus: the first definition of a name wins, a function without `return` does not count, and neither do
    decorated definitions and `from __future__` imports. evalplus reads the tree with tree-sitter; here it is `ast`.

    >>> reachable_program("import re\ndef g(): return 1\ndef h(): return 2\ndef f(): return g()\nprint(f())", "f")
    'import re\ndef g(): return 1\ndef f(): return g()'
    """
    tree = _Parser().parse(source)
    if tree is None:
        return None
    definitions: dict[str, ast.stmt] = {}
    for node in tree.body:
        if name := _counted_name(node):
            definitions.setdefault(name, node)
    wanted = _reached({name: _identifiers(node) for name, node in definitions.items()}, entry_point)
    kept = [node for node in tree.body if _is_plain_import(node)]
    kept += [node for name, node in definitions.items() if name in wanted]
    lines = source.split("\n")
    pieces = dict.fromkeys("\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in kept)
    return "\n".join(pieces) or None


def _counted_name(node: ast.stmt) -> str | None:
    match node:
        case ast.FunctionDef(name=name, decorator_list=[]) | ast.AsyncFunctionDef(name=name, decorator_list=[]):
            return name if any(isinstance(part, ast.Return) for part in ast.walk(node)) else None
        case ast.ClassDef(name=name, decorator_list=[]):
            return name
        case ast.Assign(targets=[ast.Name(id=name), *_]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
    return None


def _is_plain_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module != "__future__")


def _identifiers(node: ast.stmt) -> frozenset[str]:
    fields = ((part, name) for part in ast.walk(node) for name in ("id", "attr", "arg", "name"))
    values = (getattr(part, name, None) for part, name in fields)
    return frozenset(value for value in values if isinstance(value, str))


def _reached(uses: dict[str, frozenset[str]], entry_point: str) -> frozenset[str]:
    reached: set[str] = set()
    queue = [entry_point]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            queue.extend(uses.get(name, ()))
    return frozenset(reached)
