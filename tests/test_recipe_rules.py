"""The rules that cross keys: each breaks on the recipe it is about, and says where and why."""

import pytest
from fake_plugin import RECIPE, fake_catalog

from unigrpo_core.recipe import RecipeError, load_recipe


@pytest.fixture
def broken(tmp_path):
    """What is said of the base recipe under overrides: (path, message), and the exit code."""
    (tmp_path / "a.toml").write_text(RECIPE)

    def broken(*overrides):
        try:
            load_recipe(tmp_path / "a.toml", fake_catalog(), overrides)
        except RecipeError as error:
            return [(p.path, p.message) for p in error.problems], error.exit_code
        return [], 0

    return broken


THINK = ('episode=["think"]', 'train=["text"]', "group.fan_out=[12]")
DRAW = ('episode=["draw"]', 'train=["image"]', "group.fan_out=[12]")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        THINK,
        DRAW,
        ('train=["text"]', "image.scheduler.noise_level=0"),
        ('train=["text"]', "image.scheduler={use='ode', steps=8}"),
        ("image.objective.use=forward", "image.scheduler={use='ode', steps=8}"),
        ("image.objective.use=by_score", "rewards=[{use='smooth'}, {use='other', weight=0}]"),
        (*DRAW, "group.fan_out=[1]", "image.objective.use=by_score", "rewards=[{use='smooth'}]"),
        ("image.objective.use=by_average", "ema.decay=0.9"),
        ("image.regularizers=[{use='mse', weight=0, anchor='ema'}]",),
        ("image.regularizers=[{use='mse', weight=1, anchor='ema'}]", "ema.decay=0.9"),
        ("ema={decay=0.9, sample=true}",),
        ("image.objective.use=in_nats",),
        ("updates.turns={text=2, image=1}",),
        ("train=[]", "steps=0"),
        ("updates={count=5, data='repeat'}",),
        ("updates.count=4",),
        ("image.group_by=siblings", "group.fan_out=[4, 3]"),
        ('train=["image"]', "group.fan_out=[1, 12]"),
        ("image.regularizers=[{use='kl', weight=1.0}]",),
        ("text.regularizers=[{use='text_kl', weight=1.0}]",),
        (*THINK, "policy.use=writer"),
        (*THINK, "image.guidance.use=cfg_negative"),
    ],
)
def test_what_is_right(broken, overrides):
    assert broken(*overrides) == ([], 0)


@pytest.mark.parametrize(
    ("overrides", "path", "message"),
    [
        (
            ('episode=["think", "draw", "think", "draw"]', "group.fan_out=[2, 2, 2, 2]"),
            "episode",
            "several rounds are not supported yet",
        ),
        (
            ("compute.compile=true", "compute.checkpointing=selective"),
            "compute.checkpointing",
            '"selective" chooses among operations that compute.compile fuses; take "full" or '
            '"none", or leave compile out',
        ),
        (
            ("group.fan_out=[12]",),
            "group.fan_out",
            "should have one number per segment of the episode: 2, got 1",
        ),
        (
            (*DRAW, 'train=["image", "text"]'),
            "train.1",
            "the episode ['draw'] has no segment of the text expert",
        ),
        (('train=["text", "text"]',), "train.1", "'text' is stated twice"),
        (("train=[]",), "train", "names no expert, so the 60 steps would train nothing"),
        (
            ("updates.count=5",),
            "updates.count",
            "prompts = 12 cannot be split into updates.count = 5 equal parts; nearest are "
            "prompts = 10 or 15, or updates.count = 4",
        ),
        (
            ("updates.count=24",),
            "updates.count",
            "prompts = 12 cannot be split into updates.count = 24 equal parts; nearest are "
            "prompts = 24, or updates.count = 12",
        ),
        (
            ("prompts=13",),
            "prompts",
            "prompts = 13 cannot be split into updates.count = 2 equal parts; nearest are "
            "prompts = 12 or 14, or updates.count = 1",
        ),
        (("start=nowhere",), "start", "should be the folder of a finished run"),
        (
            ("policy.use=writer", "image.guidance.use=none"),
            "policy.use",
            "cannot draw: the episode needs a policy that",
        ),
        (
            ("group.fan_out=[1, 12]",),
            "group.fan_out",
            "makes text groups of 1, whose advantages are all 0",
        ),
        ((*DRAW, "group.fan_out=[1]"), "group.fan_out", "makes image groups of 1"),
        (
            ("image.group_by=siblings",),
            "image.group_by",
            '"siblings" needs at least 2 images per thought, and group.fan_out[1] is 1',
        ),
        (
            ("image.scheduler.steps=4",),
            "image.window",
            "range [0, 5] does not fit into 4 steps",
        ),
        (
            ("image.scheduler.noise_level=0",),
            "image.objective",
            "'flow_grpo' divides by the std of a step, and under image.scheduler 'sde' nothing "
            "would be stochastic: its noise_level is 0",
        ),
        (
            ("image.scheduler={use='ode', steps=8, noise_level=1}",),
            "image.objective",
            "'flow_grpo' divides by the std of a step, and under image.scheduler 'ode' nothing "
            "would be stochastic: its std is always 0",
        ),
        (
            (
                "image.objective.use=plain",
                "image.scheduler.noise_level=0",
                "image.regularizers=[{use='mse', weight=1}, {use='kl', weight=1}]",
            ),
            "image.regularizers.1",
            "'kl' divides by the std of a step, and under image.scheduler 'sde' nothing",
        ),
        (
            ("image.objective.use=forward", "image.regularizers=[{use='kl', weight=1}]"),
            "image.regularizers.0",
            "'kl' divides by the std of a step, and the points of image.objective 'forward' are",
        ),
        (
            ("image.objective.use=by_score", "rewards=[{use='smooth'}, {use='other'}]"),
            "rewards.1",
            "'other' is not differentiable, and image.objective 'by_score' goes down its gradient",
        ),
        (
            ("image.objective.use=by_average",),
            "image.objective",
            "'by_average' needs it, but there is no moving average of the weights: set ema.decay",
        ),
        (
            ("image.regularizers=[{use='mse', weight=1, anchor='ema'}]",),
            "image.regularizers.0.anchor",
            "there is no moving average of the weights: set ema.decay",
        ),
        (
            ("image.scheduler={use='ends', steps=8, noise_level=1.5}",),
            "image.scheduler.noise_level",
            "'ends' takes noise levels up to 1, got 1.5",
        ),
        (
            (
                "image.scheduler={use='ends', steps=8, noise_level=0.8}",
                "image.window={use='random', size=1, range=[7, 8]}",
            ),
            "image.window",
            "the last step of image.scheduler 'ends' has no noise, and this window has rollout 1",
        ),
        (
            ("image.objective.use=plain", "image.scheduler={use='ode', steps=8, noise_level=1}"),
            "image.scheduler.noise_level",
            "'ode' has no noise, got 1: leave it out",
        ),
        (
            (
                "image.objective.use=plain",
                "image.regularizers=[{use='kl', weight=1}]",
                "image.scheduler={use='ends', steps=8, noise_level=0.8}",
                "image.window={use='random', size=1, range=[7, 8]}",
            ),
            "image.window",
            "the last step of image.scheduler 'ends' has no noise, and this window has rollout 1",
        ),
        (("ema.sample=true",), "ema.sample", "there is no moving average of the weights"),
        (("ema.decay=0.9",), "ema.decay", "nothing reads the moving average: what is evaluated"),
        (("ema.slope=0.1",), "ema.slope", "there is no moving average of the weights"),
        (
            (
                "image.objective.use=in_nats",
                "image.scheduler={use='squares', steps=8, noise_level=0.8}",
            ),
            "image.objective",
            "the clip range of 'in_nats' is in nats, and log-ratios of image.scheduler 'squares'"
            " are in latent^2: set clip_unit",
        ),
        (
            ("updates.turns={text=1, image=1}", 'train=["text"]'),
            "updates.turns",
            "takes two experts in turn, and train = ['text']",
        ),
        (
            ("text.regularizers=[{use='mse', weight=1}]",),
            "text.regularizers.0.use",
            "'mse' reads v_anchor, which a TokenStep does not have: it belongs in image.regular",
        ),
        (
            ("image.regularizers=[{use='text_kl', weight=1}]",),
            "image.regularizers.0.use",
            "'text_kl' reads logps_anchor, which a FlowStep does not have: it belongs in text.",
        ),
        (
            ("image.guidance.use=cfg_negative",),
            "image.guidance",
            "'cfg_negative' needs the unconditional branch 'negative', which policy 'unified'",
        ),
        (
            ("evaluation.guidance.use=cfg_negative",),
            "evaluation.guidance",
            "'cfg_negative' needs the unconditional branch 'negative', which policy 'unified'",
        ),
    ],
)
def test_what_breaks_a_rule(broken, overrides, path, message):
    [(at, said)], code = broken(*overrides)
    assert at == path
    assert said.startswith(message)
    assert code == 2


def test_a_regularizer_that_reads_what_does_not_exist_is_its_plugins_fault(broken):
    [(path, message)], code = broken("image.regularizers=[{use='odd', weight=1}]")
    assert path == "image.regularizers.0.use"
    assert message.startswith("'odd' reads moon, which a FlowStep does not have, and nor does any")
    assert code == 3


def test_start_needs_final_weights(broken, tmp_path):
    (tmp_path / "run").mkdir()
    assert broken(f"start={tmp_path}/run")[0][0][0] == "start"
    (tmp_path / "run" / "final").mkdir()
    assert broken(f"start={tmp_path}/run") == ([], 0)


@pytest.mark.parametrize(
    ("segment", "lines", "paths"),
    [
        (
            "draw",
            (),
            {
                "advantage",
                "text.objective",
                "image.objective",
                "image.window",
                "image.scheduler",
                "image.guidance",
                "evaluation.scheduler",
                "evaluation.guidance",
            },
        ),
        (
            "draw",
            ('train = ["text"]',),
            {
                "advantage",
                "text.objective",
                "image.scheduler",
                "image.guidance",
                "evaluation.scheduler",
                "evaluation.guidance",
            },
        ),
        (
            "think",
            ('episode = ["think"]', 'train = ["text"]', "group = { fan_out = [4] }"),
            {"advantage", "text.objective"},
        ),
        (
            "think",
            ('episode = ["think"]', "train = []", "steps = 0", "group = { fan_out = [4] }"),
            set(),
        ),
    ],
)
def test_methods_are_required_where_they_are_used(tmp_path, segment, lines, paths):
    head = RECIPE.partition("[advantage]")[0]
    (tmp_path / "a.toml").write_text("\n".join((*lines, head)))
    told = set()
    try:
        load_recipe(tmp_path / "a.toml", fake_catalog())
    except RecipeError as error:
        told = {p.path for p in error.problems}
    assert told == paths
