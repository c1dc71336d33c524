from __future__ import annotations

import ast
import time
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from greenloop.prompt.extract import (
    answered,
    extract_code,
    find_fences,
    first_fenced_block,
    longest_valid_span,
    reachable_program,
    well_formed,
)

ADD = "def add(a, b):\n    return a + b\n"


def test_a_closed_python_block_is_the_program():
    assert extract_code(f"Sure, here it is:\n\n```python\n{ADD}```\n\nIt adds.", "add") == ADD


@pytest.mark.parametrize("label", ["py", "Python", "PYTHON3", "python ", ""])
def test_the_label_may_be_spelt_in_any_usual_way_or_be_missing(label):
    assert extract_code(f"```{label}\n{ADD}```", "add") == ADD


@pytest.mark.parametrize(("opening", "closing"), [("~~~python", "~~~"), ("````python", "````"), ("```python", "`````")])
def test_tildes_and_longer_markers_fence_too(opening, closing):
    assert extract_code(f"{opening}\n{ADD}{closing}\nDone.", "add") == ADD


def test_a_shorter_marker_does_not_close_a_longer_one():
    code = 'def add(a, b):\n    """\n    ```\n    add(1, 2)\n    ```\n    """\n    return a + b\n'
    assert extract_code(f"````python\n{code}````", "add") == code


def test_a_block_indented_in_a_list_loses_that_indentation_only():
    text = "1. Like this:\n\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n"
    assert extract_code(text, "add") == ADD
    assert find_fences(text)[0].code == ADD.rstrip("\n")


def test_code_indented_inside_an_unindented_block_is_moved_to_the_left():
    assert extract_code("```python\n    def add(a, b):\n        return a + b\n```", "add") == ADD


def test_windows_line_ends_become_plain_ones():
    assert extract_code("Hi\r\n```python\r\ndef add(a, b):\r\n    return a + b\r\n```\r\n", "add") == ADD


def test_an_opening_marker_may_follow_prose_on_its_line():
    assert extract_code(f"Here is the code: ```python\n{ADD}```", "add") == ADD


def test_a_marker_amid_prose_opens_nothing():
    assert find_fences("Use ``` to open a block and ``` to close it.\nThen go on.") == ()


def test_code_may_start_on_the_line_of_the_label_and_end_on_that_of_the_closing_marker():
    assert extract_code("```python def add(a, b):\n    return a + b```\nDone.", "add") == ADD
    assert extract_code("```python def add(a, b): return a + b```", "add") == "def add(a, b): return a + b\n"


def test_of_several_blocks_the_first_that_defines_the_entry_point_wins():
    usage = "print(add(1, 2))\n"
    other = "def add(a, b):\n    return b + a\n"
    text = f"Run this:\n```python\n{usage}```\nwith\n```python\n{ADD}```\nor\n```python\n{other}```\n"
    assert extract_code(text, "add") == ADD


def test_a_block_that_parses_beats_an_earlier_one_that_does_not():
    assert extract_code(f"```python\ndef add(a, b)\n    return a\n```\nCorrected:\n```python\n{ADD}```", "add") == ADD


def test_earlier_blocks_of_nothing_but_definitions_are_kept_as_helpers():
    blocks = ("import math", "print('hi')", "def f(x):\n    return math.sqrt(x)")
    text = "\nthen\n".join(f"```python\n{block}\n```" for block in blocks)
    assert extract_code(text, "f") == "import math\n\ndef f(x):\n    return math.sqrt(x)\n"


def test_without_a_defining_block_the_first_python_block_is_the_program_and_nothing_is_joined():
    text = "```bash\npip install x\n```\n```python\nx = 1\n```\n```python\ny = 2\n```"
    assert extract_code(text, "f") == "x = 1\n"


def test_an_unlabelled_block_of_prose_is_no_program():
    assert extract_code("```\nthis is not python at all\n```", "f") is None


def test_a_block_of_another_language_is_no_program_unless_it_defines_the_entry_point():
    assert extract_code("```javascript\nx = 1\n```", "add") is None
    assert extract_code(f"```javascript\n{ADD}```", "add") == ADD


def test_a_closed_block_with_a_syntax_error_is_handed_on_unrepaired():
    broken = "def add(a, b):\n    return a +\nprint(add(1, 2))\n"
    assert extract_code(f"```python\n{broken}```", "add") == broken


def test_a_closed_block_with_an_error_after_the_definition_is_not_repaired_either():
    broken = f"{ADD}The output is 3\n"
    assert extract_code(f"```\n{broken}```", "add") == broken
    assert extract_code(f"```python\nprint(add(1, 2))\n```\n```python\n{broken}```", "add") == broken


def test_an_unclosed_block_is_read_to_its_end():
    assert extract_code(f"```python\n{ADD}", "add") == ADD


def test_an_answer_cut_off_after_the_definition_loses_only_the_unfinished_statement():
    text = f"```python\nimport math\n\n{ADD}\nprint(add(1, 2))\nprint(add(3,"
    assert extract_code(text, "add") == f"import math\n\n{ADD}\nprint(add(1, 2))\n"


def test_an_answer_cut_off_inside_the_definition_stays_broken():
    cut = "def add(a, b):\n    total = 0\n    return (a +"
    assert extract_code(f"```python\n{cut}", "add") == cut + "\n"


def test_a_second_opening_marker_ends_a_block_that_was_never_closed():
    fences = find_fences("```python\nx = 1\n```python\ny = 2\n```")
    assert [(fence.code, fence.closed) for fence in fences] == [("x = 1", False), ("y = 2", True)]


def test_a_marker_right_after_the_opening_one_opens_the_same_block():
    """A model in training drifts to that form, and would talk on if it did not count as an answer."""
    text = f"```\n```\n{ADD}```\n"
    assert [(fence.code, fence.closed) for fence in find_fences(text)] == [(ADD.rstrip("\n"), True)]
    assert answered(text, "add")
    assert well_formed(f"```python\n```\n{ADD}```", "add")
    assert not answered("```\n```\n", "add")
    assert extract_code(f"```\n```\nHere it is:\n```\n{ADD}```\nThat is all.", "add") == ADD
    assert extract_code(f"```python\n```\nHere it is:\n```python\n{ADD}```", "add") == ADD


def test_unfenced_code_is_found_between_prose():
    text = f"Here's the function you wanted.\nimport math\n\n{ADD}\nThis function isn't slow.\nDone"
    assert extract_code(text, "add") == f"import math\n\n{ADD}"


def test_unfenced_code_keeps_helpers_above_and_calls_below_but_not_words_that_happen_to_be_python():
    text = f"Answer\n@cache\ndef half(x):\n    return x / 2\n\n{ADD}print(add(1, 2))\nNote: done\nEnjoy"
    assert extract_code(text, "add") == f"@cache\ndef half(x):\n    return x / 2\n\n{ADD}print(add(1, 2))\n"


def test_unfenced_code_goes_upwards_past_prose_that_looks_like_code():
    text = f"from the task we learn that\nimport numbers is easy\nimport math\n{ADD}"
    assert extract_code(text, "add") == f"import math\n{ADD}"


def test_unfenced_code_starts_right_below_the_last_line_that_does_not_parse():
    text = f"from the task we learn that\nimport math\n{ADD}"
    assert extract_code(text, "add") == f"import math\n{ADD}"


def test_unfenced_indented_code_is_moved_to_the_left():
    assert extract_code("Like so:\n\n    def add(a, b):\n        return a + b\n\nDone.", "add") == ADD


def test_a_closing_marker_without_an_opening_one_does_no_harm():
    assert extract_code(f"{ADD}```\nThis adds two numbers.", "add") == ADD


def test_of_several_unfenced_definitions_the_longest_run_wins():
    text = f"def add(a, b): return a\nThat was wrong, so:\n{ADD}"
    assert extract_code(text, "add") == ADD


def test_of_unfenced_definitions_of_one_length_the_first_wins():
    text = f"First:\n{ADD}Second:\n{ADD.replace('+', '-')}"
    assert extract_code(text, "add") == ADD


def test_an_entry_point_may_be_a_lambda_or_an_import():
    assert extract_code("```python\nadd = lambda a, b: a + b\n```", "add") == "add = lambda a, b: a + b\n"
    assert extract_code("```python\nfrom operator import add\n```\n", "add") == "from operator import add\n"


def test_a_function_of_another_name_is_still_a_program():
    assert extract_code(f"I would write\n{ADD}", "plus") == ADD
    assert extract_code(f"```python\n{ADD}```", "plus") == ADD


@pytest.mark.parametrize("text", ["", "   \n", "I cannot do that.", "```python\n```", "``````", "def add(a, b)"])
def test_text_without_code_is_no_program(text):
    assert extract_code(text, "add") is None


def test_what_follows_done_is_ignored():
    assert extract_code(f"{ADD}[DONE]\ndef add(a, b): return 0\nprint()\n", "add") == ADD
    assert extract_code(f"```python\n{ADD}```[DONE]", "add") == ADD


def test_without_an_entry_point_the_first_block_that_defines_anything_wins():
    assert extract_code(f"```python\nprint(1)\n```\n```python\n{ADD}```") == ADD
    assert extract_code("```python\nprint(1)\n```") == "print(1)\n"


def test_a_regular_expression_escape_neither_warns_nor_fails():
    code = 'import re\ndef f(s):\n    return re.findall("\\d", s)\n'
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extract_code(f"```python\n{code}```", "f") == code
        assert well_formed(f"```python\n{code}```", "f")


def test_a_null_byte_ends_what_can_be_parsed():
    assert extract_code(f"{ADD}x = '\0'\n", "add") == ADD


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"```python\n{ADD}```", True),
        (f"Sure:\n\n```py\n{ADD}```\n\nDone.", True),
        (f"```python\n{ADD}", False),
        (f"```\n{ADD}```", False),
        (f"```java\n{ADD}```", False),
        (f"```python\n{ADD}```\n```python\n{ADD}```", False),
        (f"```python\n{ADD}```\nOutput:\n```\n3\n```", False),
        ("```python\ndef add(a, b) return\n```", False),
        ("```python\ndef plus(a, b):\n    return a\n```", False),
        ("```python\nclass A:\n    def add(self): pass\n```", False),
        ("```python\ndef add(a, b):\n    return a + b```", False),
        (ADD, False),
        ("", False),
    ],
)
def test_well_formed_means_one_closed_python_block_that_defines_the_entry_point(text, expected):
    assert well_formed(text, "add") is expected


LONG = 100_000
SLOW = {
    "many definitions": ADD * (LONG // len(ADD)),
    "many broken definitions": "def add(\n" * (LONG // 9),
    "many indented definitions": "".join(f"{' ' * (i % 40)}def add(a): x\n" for i in range(LONG // 36)),
    "many lines of one letter": "x\n" * (LONG // 2),
    "prose that looks like code": "from here on = we go\n" * (LONG // 21) + ADD,
    "many blocks": "```python\nx\n```\n" * (LONG // 16),
    "many defining blocks that do not parse": "```python\ndef add(:\n```\n" * (LONG // 24),
    "deep brackets": "def add(a):\n    return " + "(" * LONG,
    "deep unary": "def add(a):\n    return " + "-" * LONG,
    "long sum": "def add(a):\n    return " + "1+" * (LONG // 2) + "1",
    "back-ticks": "`" * LONG,
    "spaces after a marker": "```" + " " * LONG + "`",
    "blank lines": "\n" * LONG,
    "blank indented lines": "    \n" * (LONG // 5) + ADD,
    "null bytes": "def add():\n" + "\0" * LONG,
    "decorators": "@x\n" * (LONG // 3),
    "tabs": "\t" * LONG + "def add(): pass",
}


@pytest.mark.parametrize("text", SLOW.values(), ids=SLOW.keys())
@pytest.mark.parametrize("wrap", ["{}", "```python\n{}\n```", "```python\n{}"], ids=["bare", "closed", "unclosed"])
def test_a_hundred_kilobytes_of_anything_cost_less_than_a_fifth_of_a_second(text, wrap):
    wrapped = wrap.format(text)
    assert min(seconds(extract_code, wrapped) for _ in range(3)) < 0.2
    assert min(seconds(harness_rules, wrapped) for _ in range(3)) < 0.4


def harness_rules(text, entry_point):
    first_fenced_block(text)
    span = longest_valid_span(text)
    return span and reachable_program(span, entry_point)


def seconds(function, text):
    began = time.process_time()
    function(text, "add")
    return time.process_time() - began


fragments = st.sampled_from(
    [
        "```",
        "```python\n",
        "~~~",
        "\n",
        "    ",
        "\t",
        "def add(a, b):",
        "return a",
        "(",
        "'''",
        "# x",
        "[DONE]",
        "\0",
        "é",
        "\ud800",
        "\\",
        "add = 1",
        "x\n",
        "import os\n",
        "@",
        "class add:",
        "if x:",
        "f'{",
        "\r\n",
        "- ",
        "Here is",
    ]
)
texts = st.one_of(st.text(max_size=300), st.lists(fragments, max_size=40).map("".join))


@given(texts, st.sampled_from(["add", "", "x", "a.b("]))
@settings(max_examples=400, deadline=None)
def test_no_text_makes_extraction_raise(text, entry_point):
    program = extract_code(text, entry_point)
    assert program is None or (program.strip() and program.endswith("\n"))
    assert well_formed(text, entry_point) in (True, False)
    harness_rules(text, entry_point)


@given(texts)
@settings(max_examples=200, deadline=None)
def test_a_well_formed_answer_always_yields_a_program_that_parses(text):
    wrapped = f"{text}\n```python\n{ADD}```\n"
    if well_formed(wrapped, "add"):
        assert extract_code(wrapped, "add") == ADD


lines = st.sampled_from(
    [
        "def f(x):",
        "    return x",
        "    y = (",
        "x = 1",
        "This is prose.",
        "",
        "import os",
        "try:",
        "    pass",
        "'''",
        ")",
        "except E:",
        "if x:",
        "else:",
        "    # c",
        "# c",
        "@dec",
        "print(x",
        "It's",
        "f'{a b}'",
        "class A:",
        "  z",
    ]
)


@given(st.lists(lines, max_size=9).map("\n".join))
@example("try:\n    pass\nx = 1\nexcept E:\n    pass")
@settings(max_examples=400, deadline=None)
def test_the_longest_valid_span_is_as_long_as_trying_every_pair_of_lines_finds(text):
    found = longest_valid_span(text)
    assert non_blank(found or "") == exhaustive_length(text.split("\n"))
    assert found is None or parses(found)


def exhaustive_length(rows):
    spans = (rows[i:j] for i in range(len(rows)) for j in range(i + 1, len(rows) + 1))
    return max((non_blank("\n".join(span)) for span in spans if parses("\n".join(span))), default=0)


def non_blank(text):
    return sum(bool(line.strip()) for line in text.split("\n"))


def parses(source):
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def test_a_completion_of_an_opened_block_ends_at_its_closing_marker():
    assert first_fenced_block(f"{ADD}```\nThis adds.\n```python\nprint(1)\n```") == ADD.rstrip("\n")


def test_a_completion_that_opens_its_own_block_is_read_from_there():
    assert first_fenced_block(f"```python\n{ADD}```\nDone") == ADD.rstrip("\n")


def test_a_completion_that_never_closes_the_block_is_taken_whole():
    assert first_fenced_block(ADD) == ADD


def test_a_completion_that_closes_the_block_at_once_holds_no_code():
    assert first_fenced_block("```") == first_fenced_block("```\nI cannot do it.") == ""


def test_the_first_word_of_a_program_is_not_a_language_tag():
    assert first_fenced_block("import math\nx = 1\n```").startswith("import math")


def test_reachable_keeps_imports_and_what_the_entry_point_uses_and_nothing_else():
    source = (
        "from __future__ import annotations\nimport os\nfrom re import sub\nLIMIT: int = 3\nUNUSED = 4\n"
        "class Box:\n    size = LIMIT\n"
        "def helper(x):\n    return Box()\n"
        "def silent(x):\n    pass\n"
        "@cache\ndef decorated(x):\n    return 1\n"
        "def add(a, b):\n    silent(a)\n    decorated(a)\n    return helper(a)\n"
        "def add(a, b):\n    return 0\n"
        "print(add(1, 2))\n"
    )
    assert reachable_program(source, "add") == (
        "import os\nfrom re import sub\nLIMIT: int = 3\n"
        "class Box:\n    size = LIMIT\n"
        "def helper(x):\n    return Box()\n"
        "def add(a, b):\n    silent(a)\n    decorated(a)\n    return helper(a)"
    )


def test_reachable_of_source_without_the_entry_point_keeps_only_imports():
    assert reachable_program("import os\ndef g():\n    return 1", "f") == "import os"
    assert reachable_program("x = 1", "f") is None
    assert reachable_program("def f(:", "f") is None


@given(texts, texts)
@example("", "```python\ndef add(a, b):\n    return 0\n```\n")
@settings(max_examples=400, deadline=None)
def test_what_follows_a_whole_answer_cannot_change_its_program(before, after):
    whole = f"{before}\n```python\n{ADD}```\n"
    if answered(whole, "add"):
        assert extract_code(whole + after, "add") == extract_code(whole, "add")


def test_an_answer_is_whole_only_when_its_block_is_closed_parses_and_defines_the_function():
    assert answered(f"```python\n{ADD}```\n", "add")
    assert not answered(f"```python\n{ADD}", "add")
    assert not answered(f"```python\n{ADD}```\n", "other")
    assert not answered("```python\ndef add(a, b:\n```\n", "add")
    assert not answered("Here it is:\n```\n", "add")
