"""Questions about source code that are answered by its syntax tree.

In: source text. Out: names, or the reason why it is not Python. Nothing is executed.
Names are taken at face value: scopes and rebinding are not followed.
"""

import ast
import builtins
import warnings
from collections.abc import Iterable, Sequence


def parse(source: str) -> ast.Module:
    """The syntax tree; odd escapes such as `"\\d"` are accepted in silence, as Python's default filters do.

    Raises:
        SyntaxError: the source is not Python (also for null bytes, surrogates and nesting too deep to parse).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (ValueError, RecursionError, MemoryError) as error:
            raise SyntaxError(str(error) or "nested too deeply") from error


def called_names(tree: ast.AST) -> frozenset[str]:
    """Plain names that are called, or handed to a call as in `check(candidate)`."""
    names = set()
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            handed = (call.func, *call.args, *(keyword.value for keyword in call.keywords))
            names |= {node.id for node in handed if isinstance(node, ast.Name)}
    return frozenset(names)


def bound_names(tree: ast.AST) -> frozenset[str]:
    """Names that the code binds anywhere: definitions, arguments, assignments, imports."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.alias(name=name, asname=asname):
                names.add(asname or name.partition(".")[0])
    return frozenset(names)


def discards_comparison(tree: ast.Module) -> bool:
    """Whether a statement compares and throws the answer away: an `assert` was forgotten.

    >>> discards_comparison(parse("f(1) == 2")), discards_comparison(parse("assert f(1) == 2"))
    (True, False)
    """
    return any(isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare) for node in ast.walk(tree))


def entry_point_candidates(tests: Sequence[ast.Module], reference: ast.Module, own: Iterable[ast.Module]) -> list[str]:
    """Names that every test calls and that the solution must define; one name means that the entry point is known.

    With a reference these are its top-level functions (its classes, if no function is called by all tests);
    without one, what is neither a builtin nor bound by the tests or by the data set's own code.

    >>> tests = [parse("assert set(f([1])) == {1}"), parse("assert f(g()) == {}")]
    >>> entry_point_candidates(tests, parse("def g(): ...\\ndef f(x): ..."), [])
    ['f']
    >>> entry_point_candidates(tests, parse(""), [])
    ['f']
    """
    called = frozenset.intersection(*map(called_names, tests))
    functions = [node.name for node in reference.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    classes = [node.name for node in reference.body if isinstance(node, ast.ClassDef)]
    if reference.body:
        return sorted(called.intersection(functions)) or sorted(called.intersection(classes))
    known = frozenset(dir(builtins)).union(*map(bound_names, (*tests, *own)))
    return sorted(called - known)
