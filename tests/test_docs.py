"""The documentation is true: its recipes pass ``check``, its plugins load, its links resolve."""

import inspect
import json
import re
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from unigrpo_core import cli
from unigrpo_core.catalog import Broken, Catalog, Disabled, collect, load_catalog
from unigrpo_core.plugin import Hooks
from unigrpo_core.recipe import RecipeError, find_recipe, load_recipe, shipped_recipes
from unigrpo_core.records import FlowStep, Prompt, RewardBatch

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*/README.md"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *TUTORIALS, *EXAMPLES])
CHECKPOINT = ROOT / "plugins" / "unigrpo_board" / "checkpoint"
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PAGES += sorted((ROOT / "docs").glob("[ehr]*/*.md"))  # explanation, how-to, reference


@dataclass(frozen=True)
class Block:
    """A fenced block: `````toml recipe`` has language "toml" and mark "recipe"."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def all_blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in FENCE.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            yield Block(page, line, found[1], found[2] or "", found[3])


BLOCKS = list(all_blocks())


def marked(language: str, mark: str) -> list[Block]:
    return [b for b in BLOCKS if b.language == language and b.mark.partition("=")[0] == mark]


def load_plugins(page: Path, folder: Path, monkeypatch) -> Catalog:
    """What a page's plugin blocks provide, as if a distribution named after it were installed; for
    the page of an example, what that provides."""
    monkeypatch.syspath_prepend(folder)
    entries = []
    if page in EXAMPLES:
        monkeypatch.syspath_prepend(page.parent)
        project = tomllib.loads((page.parent / "pyproject.toml").read_text())["project"]
        origin = (project["name"], project["version"])
        named = project["entry-points"]["unigrpo"].items()
        entries += [(EntryPoint(*item, "unigrpo"), *origin) for item in named]
    for number, block in enumerate(b for b in marked("python", "plugin") if b.page == page):
        name = f"{page.stem.lower().replace('-', '_')}_plugin_{number}"
        (folder / f"{name}.py").write_text(block.text)
        entries.append((EntryPoint(name, name, "unigrpo"), page.stem, "1"))
    return collect(entries)


# --- recipes ----------------------------------------------------------------------------------


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A folder of its own with the shipped recipes in it, as the working directory."""
    folder = tmp_path / "recipes"
    shutil.copytree(shipped_recipes(), folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("block", marked("toml", "recipe"), ids=str)
def test_a_recipe_passes_check(block, recipes, tmp_path, monkeypatch):
    ours, theirs = load_catalog(), load_plugins(block.page, tmp_path, monkeypatch)
    (recipes / "recipe.toml").write_text(block.text)
    catalog = Catalog(ours.components + theirs.components)
    resolved = load_recipe("recipe.toml", catalog)
    assert resolved.notes() == []
    shipped = block.mark.partition("=")[2]
    if shipped:
        assert resolved.hash == load_recipe(find_recipe(shipped), catalog).hash


def test_the_readme_shows_a_recipe_as_it_is_shipped():
    [block] = [b for b in marked("toml", "recipe") if b.mark == "recipe=no_cfg_mse"]
    lines = (ROOT / "recipes" / "no_cfg_mse.toml").read_text().splitlines(keepends=True)
    assert block.text == "".join(line for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("block", marked("toml", "broken"), ids=str)
def test_a_broken_recipe_gives_the_errors_shown(block, recipes):
    (recipes / "recipe.toml").write_text(block.text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.toml", load_catalog())
    shown = BLOCKS[BLOCKS.index(block) + 1]
    assert shown.mark == "errors"
    assert f"{caught.value}\n" == shown.text


def printed(capsys, *argv):
    """What a command prints as JSON, and its exit code."""
    code = cli.main(argv)
    return json.loads(capsys.readouterr().out), code


def test_check_as_json_is_as_shown(recipes, capsys):
    [shown], [block] = marked("json", "check"), marked("toml", "mistaken")
    (recipes / "recipe.toml").write_text(block.text)
    found, code = printed(capsys, "check", "recipe.toml", "fast.toml", "--json")
    expected = json.loads(shown.text.replace("/home/me", str(recipes)))
    assert len(found[1]["hash"]) == 64
    expected[1]["hash"] = found[1]["hash"]
    assert (found, code) == (expected, 2)


def test_show_as_json_has_the_keys_named(recipes, capsys):
    page = (ROOT / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| `unigrpo (show.*) --json` \| (.*) \|$", page, re.MULTILINE)
    named = {command: re.findall(r"`\{(.*?)\}`", prints) for command, prints in rows}
    names = ("no_cfg_mse", "cfg_mse")
    listed, _ = printed(capsys, "show", "--json")
    one, _ = printed(capsys, "show", names[0], "--json")
    two, _ = printed(capsys, "show", *names, "--json")
    assert named == {
        "show": [", ".join(listed[0])],
        "show A": [", ".join(one)],
        "show A B": [", ".join(two), ", ".join(two["differences"][0])],
    }
    assert one["values"]["image"]["scheduler"]["steps"] == 8
    assert one["origins"]["image.scheduler.steps"].rpartition("/")[2] == "no_cfg_mse.toml:37"
    assert one["origins"]["seed"] == "default"
    assert (two["a"], two["b"]) == names
    [row] = [row for row in two["differences"] if row["path"] == "image.guidance.scale"]
    assert (row["a"], row["b"]) == (None, 2.0)


# --- plugins ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", sorted({b.page for b in marked("python", "plugin")}), ids=str)
def test_plugins_load_and_work(page, tmp_path, monkeypatch):
    catalog = load_plugins(page, tmp_path, monkeypatch)
    assert catalog.broken == ()
    assert len(catalog.components) == sum(b.page == page for b in marked("python", "plugin"))
    for item in catalog.components:
        built = item.provider.build(item.provider.options.model_validate({}))
        tries = {
            "regularizer": try_regularizer,
            "reward": try_reward,
            "text_objective": try_text_objective,
        }
        tries[item.kind](built)


def try_text_objective(objective):
    """At ratio 1 the gradient is that of -A log p, and what is masked counts for nothing."""
    logps = torch.tensor([[-0.5, -1.0], [-2.0, -9.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    values, _ = objective.loss(logps, logps.detach(), mask, torch.tensor([2.0, -3.0]))
    (gradient,) = torch.autograd.grad((values * objective.weights(mask)).sum(), logps)
    torch.testing.assert_close(gradient, torch.tensor([[-2.0, -2.0], [3.0, 0.0]]))


def try_regularizer(penalty):
    v = torch.randn(2, 3, 4, 5)
    for gap, sign in ((0.0, 0), (0.01, 1), (10.0, 1)):
        step = FlowStep(
            v=v + gap,
            v_anchor=v,
            x_t=v,
            t=v[:, :, 0, 0],
            t_next=v[:, :, 0, 0],
            transition=None,
            transition_anchor=None,
        )
        found = penalty(step)
        assert (found.shape, found.dtype) == ((2, 3), torch.float32)
        assert (found.sign() == sign).all()


def try_reward(reward):
    prompts = tuple(Prompt(str(row), "a word") for row in range(2))
    batch = RewardBatch(prompts, ("", ""), torch.rand(2, 3, 8, 8), ("a", "b"))
    low, high = reward.range
    for found in (reward.score(batch), *reward.details(batch).values()):
        assert (found.shape, found.dtype) == ((2,), torch.float32)
        assert ((low <= found) & (found <= high)).all()


def test_every_hook_is_described_with_its_signature():
    page = (ROOT / "docs" / "plugins.md").read_text()
    described = dict(re.findall(r"^### `(unigrpo_[^`\n]+)`\n+(.*?)(?=\n#|\Z)", page, re.M | re.S))
    exact = {}
    for name, hook in vars(Hooks).items():
        if name.startswith("unigrpo_"):
            signature = inspect.signature(hook)
            arguments = [str(p) for key, p in signature.parameters.items() if key != "self"]
            exact[f"{name}({', '.join(arguments)}) -> {signature.return_annotation}"] = hook
    assert set(described) == set(exact)
    for heading, hook in exact.items():
        interfaces = re.findall(r"[A-Z]\w+", hook.__doc__)
        assert all(f"`{name}`" in described[heading] for name in interfaces), heading


def test_the_shape_of_the_listing_is_described(capsys, monkeypatch):
    page = (ROOT / "docs" / "plugins.md").read_text()
    rows = re.findall(r"^\| `([\w.\[\]]+)` \| objects with (.*) \|$", page, re.MULTILINE)
    described = {key: re.findall(r"`(\w+)`", words) for key, words in rows}
    installed = load_catalog()
    broken = Broken("entry", "distribution", "version", "reason")
    catalog = replace(installed, broken=(broken,), disabled=(Disabled("a", "1", "me"),))
    monkeypatch.setattr(cli.plugins, "load_catalog", lambda: catalog)
    assert cli.main(["plugins", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    option = next(item["options"][0] for item in found["components"] if item["options"])
    assert described == {
        **{key: list(items[0]) for key, items in found.items()},
        "components[].options": list(option),
    }


# --- tutorials --------------------------------------------------------------------------------


FOLLOWED = sorted({b.page for b in BLOCKS if b.mark.partition("=")[0] in ("run", "file")})


def test_every_tutorial_is_followed():
    assert set(TUTORIALS) <= set(FOLLOWED)
    assert len(TUTORIALS) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.stem)
def test_a_tutorial_followed_literally_works(page, wheel_of, environment):
    """Blocks marked ``file=NAME`` are written, ``sh run`` (or ``run=CODE``) are run, one after the
    other in one folder of a fresh environment, and print what the next ``output`` shows."""
    fresh = environment(wheel_of(ROOT))
    blocks = [block for block in BLOCKS if block.page == page]
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        kind, _, word = block.mark.partition("=")
        if kind == "file":
            (fresh.work / word).write_text(block.text)
        elif kind == "run":
            done = fresh("sh", "-ec", f"exec 2>&1\n{block.text}")
            assert done.returncode == int(word or 0), f"{block}\n{done.stdout}"
            shown = following.text if following and following.mark == "output" else "..."
            assert matches(shown, done.stdout), f"{block}\n{done.stdout}"


def matches(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed: ``...`` stands for anything, and of decimal numbers
    only the places count, since they depend on the machine."""
    number = re.compile(r"(?<![\d.])[+-]?\d+\.\d+(e[+-]?\d+)?(?![\d.])")
    shown, printed = (number.sub("<number>", text.rstrip("\n")) for text in (shown, printed))
    pattern = ".*".join(map(re.escape, shown.split("...")))
    return re.fullmatch(pattern, printed, re.DOTALL) is not None


def test_what_matches():
    assert matches("a\n...\nb 0.25 ...", "a\nx\nb 0.75 and c\n")
    assert matches("a 1e 1.5e-07", "a 1e 2.25e-11")
    assert not matches("a 1", "a 2")
    assert not matches("version 0.1.0", "version 0.2.0")
    assert not matches("a\nb", "a\nb\nc")
    assert not matches("a (b)", "a b")


# --- pages ------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page):
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(prose):
        if target.startswith(("https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text()), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_the_architecture_page_has_every_key_of_the_main_recipe():
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.partition("## From a key to its equation")[2].partition("\n## ")[0]
    keys = re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE)
    stated = set()
    for name in ("_base/board.toml", "no_cfg_mse.toml"):
        stated |= set(stated_keys(tomllib.loads((ROOT / "recipes" / name).read_text())))
    assert set(keys) == stated
    assert len(keys) == len(set(keys))


def stated_keys(table: Mapping, above: str = "") -> Iterator[str]:
    """The keys of a recipe; a component counts as one."""
    for key, value in table.items():
        if isinstance(value, dict) and "use" not in value:
            yield from stated_keys(value, f"{above}{key}.")
        elif key != "extends":
            yield f"{above}{key}"


def test_the_checkpoint_is_the_one_described():
    [block] = marked("json", "made")
    made = json.loads((CHECKPOINT / "made.json").read_text())
    assert json.loads(block.text) == made
    assert sha256((CHECKPOINT / "ema.safetensors").read_bytes()).hexdigest() == made["sha256"]


def test_the_scorer_is_the_one_described():
    [block] = marked("json", "made-scorer")
    folder = CHECKPOINT.parent / "scorer"
    assert json.loads(block.text) == json.loads((folder / "made.json").read_text())
