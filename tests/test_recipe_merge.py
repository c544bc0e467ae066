"""How recipe files and overrides are laid over each other, and where each value is from."""

import pytest

from unigrpo_core.recipe import RecipeError
from unigrpo_core.recipe.source import read_tree


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write


def problems(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        read_tree(path, overrides)
    return [(p.file and p.file.name, p.line, p.path, p.message) for p in caught.value.problems]


def test_tables_merge_and_the_rest_replaces(write):
    write("one.toml", "a = 1\nlist = [1, 2]\n[t]\nx = 1\ny = 1\n[t.deep]\nz = 1")
    write("two.toml", "a = 2\n[t]\nx = 2")
    child = write("child.toml", 'extends = ["one.toml", "two.toml"]\nlist = [3]\n[t.deep]\nw = 3')
    tree = read_tree(child)
    assert tree.plain() == {
        "a": 2,
        "list": [3],
        "t": {"x": 2, "y": 1, "deep": {"z": 1, "w": 3}},
    }
    origins = {
        path: tree.at(path)[0].origin
        for path in [("a",), ("list",), ("t", "y"), ("t", "deep", "w")]
    }
    assert [(o.file.name, o.line) for o in origins.values()] == [
        ("two.toml", 1),
        ("child.toml", 2),
        ("one.toml", 5),
        ("child.toml", 4),
    ]


def test_a_component_is_atomic_on_use_at_every_depth(write):
    write(
        "base.toml",
        """
        [t]
        same = { use = "a", x = 1, inner = { use = "i", p = 1 } }
        silent = { use = "a", x = 1 }
        other = { use = "a", x = 1, weight = 2, inner = { q = 1 } }
        bare = { x = 1 }
        """,
    )
    child = write(
        "child.toml",
        """
        extends = ["base.toml"]
        [t]
        same = { use = "a", y = 2, inner = { use = "j" } }
        silent = { y = 2 }
        other = { use = "b", y = 2 }
        bare = { use = "b" }
        """,
    )
    assert read_tree(child).plain()["t"] == {
        "same": {"use": "a", "x": 1, "y": 2, "inner": {"use": "j"}},
        "silent": {"use": "a", "x": 1, "y": 2},
        "other": {"use": "b", "y": 2},
        "bare": {"use": "b", "x": 1},
    }


def test_extends_is_relative_and_recursive_and_may_meet_again(write):
    write("_base/root.toml", "a = 1\nb = 1")
    write("_base/left.toml", 'extends = ["root.toml"]\na = 2')
    write("_base/right.toml", 'extends = ["root.toml"]\nb = 3')
    child = write("child.toml", 'extends = ["_base/left.toml", "_base/right.toml"]')
    # right's own root comes after left, so later wins: a is 1 again
    assert read_tree(child).plain() == {"a": 1, "b": 3}


def test_a_circle_is_shown_as_a_chain(write):
    write("b.toml", 'x = 1\nextends = [\n"c.toml"]')
    write("c.toml", 'extends = ["b.toml"]')
    child = write("a.toml", 'extends = ["b.toml"]')
    [(file, line, path, message)] = problems(child)
    assert (file, line, path) == ("c.toml", 1, "extends.0")
    assert [part.split("/")[-1] for part in message.split(": ")[1].split(" -> ")] == [
        "b.toml",
        "c.toml",
        "b.toml",
    ]


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("", None, "the file states nothing"),
        (" \n\n", None, "the file states nothing"),
        ("# a = 1\n", None, "the file states nothing"),
        ("a = 1\nb = \n", 2, "not valid TOML: Invalid value"),
        ("a = 1\n\nb = [1,", 3, "not valid TOML: Invalid value"),
        ("a = 1\na = 2", 2, "not valid TOML: Cannot overwrite a value"),
        (b"a = 1\nb = '\xff'", 2, "not UTF-8 text"),
        ("a = 1\nt = {x = [1979-05-27]}", 2, "a date means nothing here; quote it"),
        ('extends = "b.toml"', 1, "expected an array of file names"),
        ("extends = [1]", 1, "expected an array of file names"),
    ],
)
def test_files_that_are_no_recipe(write, content, line, message):
    [(file, at, _, said)] = problems(write("bad.toml", content))
    assert (file, at) == ("bad.toml", line)
    assert said.startswith(message)


def test_missing_files(write, tmp_path):
    assert problems(tmp_path / "none.toml") == [("none.toml", None, "", "no such file")]
    assert problems(tmp_path)[0][3] == "is a folder, not a recipe file"
    child = write("a.toml", 'extends = [\n  "gone.toml",\n  "_base",\n]')
    (tmp_path / "_base").mkdir()
    told = problems(child)
    assert [(file, line, path) for file, line, path, _ in told] == [
        ("a.toml", 2, "extends.0"),
        ("a.toml", 3, "extends.1"),
    ]
    assert told[0][3].endswith(
        "gone.toml: no such file; a path counts from the file that states it"
    )
    assert told[1][3].endswith("_base: is a folder, not a recipe file")


def test_a_byte_order_mark_is_no_mistake(write):
    assert read_tree(write("bom.toml", b"\xef\xbb\xbfa = 1")).plain() == {"a": 1}


# --- overrides --------------------------------------------------------------------------------

BASE = """
a = 1
guidance = { use = "cfg", scale = 4.0 }
rewards = [{ use = "x", weight = 1.0 }, { use = "y" }]
counts = [12, 1]
"""


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["a=2"], "a", 2),
        (["a=2", "a=3"], "a", 3),
        (["a = [1, 2]"], "a", [1, 2]),
        (["a=runs/x-1"], "a", "runs/x-1"),
        (["a='quoted word'"], "a", "quoted word"),
        (["new.table.key=true"], "new", {"table": {"key": True}}),
        (["guidance.scale=2"], "guidance", {"use": "cfg", "scale": 2}),
        (["guidance.use=none"], "guidance", {"use": "none"}),
        (["guidance.use=cfg"], "guidance", {"use": "cfg", "scale": 4.0}),
        (["guidance={use='none'}"], "guidance", {"use": "none"}),
        # one layer: the order of its parts does not matter
        (["guidance.use=apg", "guidance.eta=1"], "guidance", {"use": "apg", "eta": 1}),
        (["guidance.eta=1", "guidance.use=apg"], "guidance", {"use": "apg", "eta": 1}),
        (["rewards.0.weight=2"], "rewards", [{"use": "x", "weight": 2}, {"use": "y"}]),
        (["rewards.0.use=z"], "rewards", [{"use": "z"}, {"use": "y"}]),
        (["rewards=[]"], "rewards", []),
        (["rewards=[{use='z'}]", "rewards.0.weight=3"], "rewards", [{"use": "z", "weight": 3}]),
        (["counts.1=3"], "counts", [12, 3]),
    ],
)
def test_overrides(write, overrides, key, value):
    tree = read_tree(write("a.toml", BASE), overrides)
    assert tree.plain()[key] == value
    untouched = {"a", "guidance", "rewards", "counts"} - {key}
    plain = read_tree(write("a.toml", BASE)).plain()
    assert {k: tree.plain()[k] for k in untouched} == {k: plain[k] for k in untouched}


@pytest.mark.parametrize(
    ("override", "path", "message"),
    [
        ("a", "a", "expected path=value"),
        ("=1", "=1", "expected path=value"),
        ("a..b=1", "a..b=1", "expected path=value"),
        (
            "a=1 2",
            "a",
            "'1 2' is neither a TOML value nor a plain word; text stands in quotes, also",
        ),
        ("a=[1", "a", "'[1' is neither"),
        ("a=", "a", "'' is neither"),
        ("a=1\nb=2", "a", "'1\\nb=2' is neither"),
        ("a=1979-05-27", "a", "a date means nothing here; quote it"),
        ("extends=[]", "extends", "only a recipe file can extend others"),
        ("rewards.2.weight=1", "rewards", "'2' is no element: the array has 2 elements"),
        ("rewards.use=z", "rewards", "'use' is no element"),
    ],
)
def test_overrides_that_mean_nothing(write, override, path, message):
    [(file, line, at, said)] = problems(write("a.toml", BASE), override)
    assert (file, line, at) == (None, None, path)
    assert said.startswith(message)


def test_the_origin_of_overridden_values(write):
    tree = read_tree(write("a.toml", BASE), ["rewards.0.weight=2", "a=3"])
    said = {path: str(tree.at(path)[0].origin).split("/")[-1] for path in (("a",), ("counts",))}
    assert said == {("a",): "--set", ("counts",): "a.toml:5"}
    assert str(tree.at(("rewards", 0, "weight"))[0].origin) == "--set"
    assert tree.at(("rewards", 0, "use"))[0].origin.line == 4
    assert tree.origin.file is not None  # the recipe as a whole is still the file's
