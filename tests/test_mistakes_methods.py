"""Methods of somebody else that fail in a run, or return what their interface does not allow."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint

import pytest
import tiny

from unigrpo_core import cli
from unigrpo_core.catalog import Catalog, collect

CATALOG = tiny.catalog()
PLUGIN = """\
from unigrpo_methods.advantages import group_norm
from unigrpo_methods.guidance import cfg
from unigrpo_methods.objectives import flow_grpo, grpo
from unigrpo_methods.schedulers import flow_sde
from unigrpo_methods.windows import random

from unigrpo_core.plugin import Provider, hookimpl

def changed(hook, module, **options):
    made = module.build(module.PROVIDER.options(**options))
    kind = type(made)
    class Mine(kind):
        def {method}(self, *given):
            good = lambda: kind.{method}(made, *given)
            {fault}
    def build(options):
        mine = object.__new__(Mine)
        mine.__dict__.update(made.__dict__)
        return mine
    @hookimpl(specname=hook)
    def yields():
        yield Provider("mine", build, needs=module.PROVIDER.needs)
    return yields

hook = changed({made})
"""
MADE = {
    "text.objective": "'unigrpo_text_objectives', grpo",
    "image.objective": "'unigrpo_image_objectives', flow_grpo, ratio_norm=True",
    "image.window": "'unigrpo_windows', random, size=1, range=(0, 2)",
    "image.scheduler": "'unigrpo_schedulers', flow_sde",
    "image.guidance": "'unigrpo_guidance', cfg, scale=2.0",
    "advantage": "'unigrpo_advantages', group_norm",
}
SLOTS = {"image.scheduler": "{use='mine', steps=4, noise_level=0.8}"}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, checkpoint):
    """Runs the tiny recipe with a component of a plugin file in a slot, one method of which has a
    fault, and returns what is told with exit code 3."""
    monkeypatch.setattr(cli.run, "load_catalog", lambda: CATALOG)
    file = tiny.recipe_file(tmp_path, checkpoint)

    def run(slot, method, fault):
        text = PLUGIN.format(method=method, fault=fault, made=MADE[slot])
        (tmp_path / "unigrpo_plugins.py").write_text(text)
        filled = SLOTS.get(slot, "{use='mine'}")
        code = cli.main(
            ["run", str(file), "--out", str(tmp_path / "out"), "--set", f"{slot}={filled}"]
        )
        told = capsys.readouterr().err
        assert code == 3, told
        return " ".join(told.split())

    return run


@pytest.mark.parametrize(
    ("slot", "method", "kind"),
    [
        ("text.objective", "loss", "text objective"),
        ("text.objective", "weights", "text objective"),
        ("image.objective", "points", "image objective"),
        ("image.objective", "log_ratio", "image objective"),
        ("image.objective", "loss", "image objective"),
        ("image.window", "steps", "window"),
        ("image.scheduler", "transition", "scheduler"),
        ("image.guidance", "combine", "guidance"),
        ("advantage", "__call__", "advantage"),
    ],
)
def test_what_fails_is_named_with_its_line(run, slot, method, kind):
    told = run(slot, method, "raise ValueError('not today')")
    assert re.search(
        rf"{kind} 'mine' of \S*unigrpo_plugins.py \S* failed: "
        r"\S*unigrpo_plugins.py:15: ValueError: not today\b",
        told,
    ), told


@pytest.mark.parametrize(
    ("slot", "method", "returned", "message"),
    [
        ("text.objective", "loss", "good()[0].sum(1), {}", r"torch.float32 \((\d+),\) as loss"),
        ("text.objective", "loss", "good()[0].sum(), {}", r"torch.float32 \(\) as loss"),
        ("text.objective", "weights", "given[0]", r"torch.bool \(\d+, \d+\) as weights"),
        ("image.objective", "loss", "good()[0].mean(1, keepdim=True), {}", "as loss"),
        ("image.objective", "loss", "good()[0], {'far': 1.0}", "1.0 as metric 'far'"),
        ("image.objective", "weights", "given[0].float().mean(1)", "as weights"),
        ("image.window", "steps", "(3, 3)", r"\(3, 3\) of 4 steps, expected 1 rising number"),
        ("image.window", "steps", "(4,)", r"\(4,\) of 4 steps"),
        ("image.window", "steps", "[]", r"\[\] of 4 steps"),
        ("advantage", "__call__", "good()[:1]", r"torch.float32 \(1,\)"),
        ("advantage", "__call__", "good() / 0", "(nan|-?inf)"),
    ],
)
def test_what_its_interface_does_not_allow_is_refused(run, slot, method, returned, message):
    told = run(slot, method, f"return {returned}")
    assert re.search(rf"'mine' of \S*unigrpo_plugins.py \S* returned .*{message}", told), told


def test_what_fails_deep_in_a_package_is_its_components(monkeypatch, capsys, tmp_path, checkpoint):
    package = tmp_path / "somebodys_clip"
    package.mkdir()
    text = PLUGIN.format(method="loss", fault="return deep.loss()", made=MADE["text.objective"])
    (package / "__init__.py").write_text(f"from somebodys_clip import deep\n{text}")
    (package / "deep.py").write_text("def loss():\n    raise ValueError('not today')\n")
    monkeypatch.syspath_prepend(tmp_path)
    theirs = collect([(EntryPoint("clip", "somebodys_clip", "unigrpo"), "somebodys-clip", "2.0")])
    both = Catalog(CATALOG.components + theirs.components)
    monkeypatch.setattr(cli.run, "load_catalog", lambda: both)
    file = tiny.recipe_file(tmp_path, checkpoint)
    argv = ["run", file, "--out", tmp_path / "out", "--set", "text.objective={use='mine'}"]
    assert cli.main([*map(str, argv)]) == 3
    told = capsys.readouterr().err
    assert "text objective 'mine' of somebodys-clip 2.0 failed: ValueError: not today" in told
