"""The line of every key: the scanner finds exactly the keys that tomllib does."""

import tomllib

import pytest

from unigrpo_core.recipe.positions import positions

HARD = r'''# a comment with [brackets] and "quotes"
title = "a # no comment [x]" # but this is one
"quoted key" . 'other.key' = 1

text = """
[not.a.table]
key = "value" \""" still inside
"""
literal = \'\'\'
[[nor.this]] \ '' \'\'\'
ends = """four quotes: """"
five = \'\'\'five: \'\'\'\'\'
empty = ["", \'\', """""", \'\'\'\'\'\']
date = 1979-05-27 07:32:00Z
point = { x = 1, y.z = [2, { deep = "}" }], "quo\u0074ed" = {} }
numbers = [
  1, # one, ]
  [ 2,
    3 ],

  { use = "a", weight = 0.5 }, { use = "b" }
    , # here
    { use = "c" },
]

[table]   # comment
a.b.c = true
a.d = -inf
[table.a2 . "b.c"]
x = 1
[late.implicit.child]
x = 1
[late]
y = 2

[[array]]
name = "first"
[array.sub]
x = 1
[[array.inner]]
x = 1
[[array.inner]]
x = 2
[[ array ]]
[[array.inner]]
x = 3'''.replace("\\'", "'")


def key_paths(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from key_paths(item, (*path, key))


@pytest.mark.parametrize("text", [HARD, HARD.replace("\n", "\r\n"), "", "# only a comment"])
def test_finds_the_keys_that_tomllib_finds(text):
    assert set(positions(text)) == set(key_paths(tomllib.loads(text)))


def test_lines():
    lines = positions(HARD)
    rows = HARD.split("\n")
    expected = {
        ("title",): "title =",
        ("quoted key", "other.key"): '"quoted key"',
        ("text",): "text =",
        ("literal",): "literal =",
        ("five",): "five =",
        ("point", "y", "z", 1, "deep"): "point =",
        ("numbers",): "numbers =",
        ("numbers", 0): "  1, # one",
        ("numbers", 1, 0): "  [ 2,",
        ("numbers", 1, 1): "    3 ],",
        ("numbers", 2, "weight"): '  { use = "a"',
        ("numbers", 3): '  { use = "a"',
        ("numbers", 3, "use"): '  { use = "a"',
        ("numbers", 4, "use"): '    { use = "c"',
        ("table", "a", "b", "c"): "a.b.c",
        ("table", "a"): "a.b.c",
        ("table", "a2", "b.c"): '[table.a2 . "b.c"]',
        ("late", "implicit"): "[late.implicit.child]",
        ("late",): "[late]",
        ("array", 0, "name"): "name =",
        ("array", 0, "sub", "x"): "x = 1",
        ("array", 1): "[[ array ]]",
        ("array", 1, "inner", 0, "x"): "x = 3",
    }
    for path, beginning in expected.items():
        assert rows[lines[path] - 1].startswith(beginning), path
    assert lines["array", 0, "inner", 1, "x"] == lines["array", 0, "inner", 1] + 1
    assert lines["array",] == lines["array", 0]
