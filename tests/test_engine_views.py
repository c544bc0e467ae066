"""Evaluations: further views of the same weights, monitors, and what a run says it cost."""

import json

import pytest
import tiny
import torch

from unigrpo_core.engine.evaluate import evaluate
from unigrpo_core.errors import UserError
from unigrpo_core.recipe import RecipeError

SWAPPED = "evaluation.views=[{name='swapped', thoughts='swapped'}]"
WORD = "rewards=[{use='word'}]"


def view_of(built, count=4, place=1):
    return evaluate(built, count, built.views[place])


# --- views ------------------------------------------------------------------------------------


def test_a_view_changes_only_what_it_states(setup):
    built = setup(
        "evaluation.views=[{name='same'}, {name='three', scheduler={use='ode', steps=1}}]"
    )
    main, same, other = (view_of(built, place=place) for place in range(3))
    assert torch.equal(same.batch.images, main.batch.images)
    assert same.batch.thoughts == other.batch.thoughts == main.batch.thoughts
    assert not torch.equal(other.batch.images, main.batch.images)
    assert {f"same:{name}": value for name, value in main.means().items()} == same.means()


def test_a_guided_view_is_what_a_guided_evaluation_is(setup):
    guided = "{use='cfg', scale=3.0}"
    view = view_of(setup(f"evaluation.views=[{{name='guided', guidance={guided}}}]"))
    alone = view_of(setup(f"evaluation.guidance={guided}"), place=0)
    assert torch.equal(view.batch.images, alone.batch.images)


def test_a_silent_view_draws_from_the_prompt_alone(setup):
    view = view_of(setup("evaluation.views=[{name='silent', episode=['draw']}]"))
    alone = view_of(setup("episode=['draw']", "train=['image']", "group.fan_out=[3]"), place=0)
    assert view.batch.thoughts is None
    assert torch.equal(view.batch.images, alone.batch.images)


def test_swapped_thoughts_are_those_of_the_prompt_before(setup):
    built = setup(WORD, SWAPPED, "evaluation.final_prompts=5")
    main, swapped = view_of(built, 5, 0), view_of(built, 5)
    assert swapped.batch.prompts == main.batch.prompts
    assert swapped.batch.thoughts == (main.batch.thoughts[-1], *main.batch.thoughts[:-1])
    assert not torch.equal(swapped.batch.images, main.batch.images)
    scores = main.scores.values[:, 0]
    assert torch.equal(swapped.scores.values[:, 0], scores.roll(1))


def test_what_is_swapped_is_the_thought_alone(setup):
    """Where all prompts think the same, swapping changes nothing: prompts and noises stay."""
    built = setup(SWAPPED)
    write = built.policy.write

    def write_one(history, sampling, keys):
        first = write(history, sampling, keys)[0].rows(torch.zeros(len(history), dtype=torch.int64))
        return first, built.policy.append(history, first)

    built.policy.write = write_one
    main, swapped = view_of(built, place=0), view_of(built)
    torch.testing.assert_close(swapped.batch.images, main.batch.images, atol=1e-5, rtol=0)


def test_chunks_of_swapped_thoughts_stay_in_order(setup):
    whole = view_of(setup(SWAPPED))
    parts = view_of(setup(SWAPPED, "compute.rollout_rows=3"))
    assert parts.batch.thoughts == whole.batch.thoughts
    torch.testing.assert_close(parts.batch.images, whole.batch.images, atol=1e-5, rtol=0)


def test_views_are_evaluated_at_the_start_and_the_end(train):
    run = train("run", WORD, SWAPPED, "monitors=[{use='brightness'}]")
    first, middle, last = tiny.lines(run, "evaluation.jsonl")
    main = ["word", "brightness"]
    assert [*middle][2:] == main
    assert [*first][2:] == [*last][2:] == [*main, *(f"swapped:{name}" for name in main)]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["swapped:word"] == last["swapped:word"]


def test_evaluation_may_think_where_training_does_not(train):
    run = train(
        "run",
        "rewards=[{use='brightness'}]",
        "monitors=[{use='word'}]",
        "episode=['draw']",
        "train=['image']",
        "group.fan_out=[3]",
        "evaluation.episode=['think','draw']",
    )
    assert all("word" in row for row in tiny.lines(run, "evaluation.jsonl"))
    assert "tokens" not in tiny.lines(run)[0]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["[{name='a'}, {name='a'}]"], "evaluation.views.1.name: 'a' is stated twice"),
        (["[{name='A b'}]"], "evaluation.views.0.name: should be lower-case letters"),
        (["[{guidance={use='none'}}]"], "evaluation.views.0.name: required"),
        (["[{name='a', thoughts='swap'}]"], "evaluation.views.0.thoughts"),
        (["[{name='a', thought='own'}]"], "did you mean 'thoughts'?"),
        (["[{name='a', guidance={use='cgf'}}]"], "did you mean 'cfg'?"),
        (["[{name='a', episode=['draw','think']}]"], "evaluation.views.0.episode: several rounds"),
        (
            ["[{name='a', episode=['draw'], thoughts='swapped'}]"],
            "evaluation.views.0.thoughts: there is nothing to swap: its episode is ['draw']",
        ),
        (
            ["[{name='a', thoughts='swapped'}]", "evaluation.final_prompts=1"],
            "evaluation.final_prompts: thoughts of one prompt cannot be swapped",
        ),
    ],
)
def test_views_that_cannot_be(tmp_path, checkpoint, overrides, says):
    with pytest.raises(RecipeError) as error:
        tiny.recipe(tmp_path, checkpoint, f"evaluation.views={overrides[0]}", *overrides[1:])
    assert says in str(error.value)


@pytest.mark.parametrize("scope", ["episode", "thought"])
def test_evaluation_draws_do_not_depend_on_the_noise_scope_of_training(setup, scope):
    batches = [
        view_of(setup(f"image.noise_scope='{one}'"), place=0).batch for one in ("prompt", scope)
    ]
    assert torch.equal(batches[0].images, batches[1].images)


def test_samples_of_one_prompt_start_from_different_noises(setup, tmp_path, monkeypatch):
    from unigrpo_core.engine import draw

    found = []
    real = draw.sample
    monkeypatch.setattr(draw, "sample", lambda *given: found.append(real(*given)) or found[0])
    silent = ("episode=['draw']", "train=[]", "steps=0", "group.fan_out=[1]")
    resolved = tiny.recipe(tmp_path, setup().policy.folder, "image.noise_scope='prompt'", *silent)
    draw.draw_samples(resolved, "two red circle", 2, 0, tmp_path / "sheet.png")
    first, second = found[0].segments[0].latents
    assert not torch.equal(first, second)


# --- monitors ---------------------------------------------------------------------------------


def test_monitors_change_no_weight(train):
    plain = train("plain", "rewards=[{use='brightness'}]")
    watched = train("watched", "rewards=[{use='brightness'}]", "monitors=[{use='word'}]")
    weights = "final/ema.safetensors"
    assert (plain / weights).read_bytes() == (watched / weights).read_bytes()
    assert (plain / "metrics.jsonl").read_bytes() == (watched / "metrics.jsonl").read_bytes()
    assert {"word"} == {*tiny.lines(watched, "evaluation.jsonl")[0]} - {
        *tiny.lines(plain, "evaluation.jsonl")[0]
    }


def test_a_monitor_that_is_a_reward_is_scored_once(train):
    run = train("run", WORD, "monitors=[{use='word'}, {use='word', word='green'}]")
    assert [*tiny.lines(run, "evaluation.jsonl")[0]][2:] == ["word", "word#2"]


def test_a_monitor_has_no_weight(tmp_path, checkpoint):
    with pytest.raises(RecipeError, match=r"monitors\.0\.weight: unknown key"):
        tiny.recipe(tmp_path, checkpoint, "monitors=[{use='word', weight=1.0}]")


@pytest.mark.parametrize("who", ["rewards", "monitors"])
def test_who_reads_what_a_view_does_not_have(setup, who):
    silent = "evaluation.views=[{name='silent', episode=['draw']}]"
    with pytest.raises(UserError, match=r"the episode of view 'silent' \['draw'\] has no 'think'"):
        setup(silent, f"{who}=[{{use='word'}}]")


# --- cost -------------------------------------------------------------------------------------


def test_network_calls_are_counted(train):
    """Four prompts x 3 images x 4 steps are sampled, and 2 points an image trained: once with
    gradient, and once without as the second half's old values; the first micro-batch of the first
    half is replayed twice."""
    shared = ("text.regularizers=[]", "compute.replay_tokens=100000", "steps=1")
    plain = tiny.lines(train("plain", *shared))[0]
    assert plain["calls_per_image"] == 4
    assert plain["network_calls"] == 12 * 4 + 12 * 2 + 6 * 2 + 6 * 2
    guided = tiny.lines(train("guided", *shared, "image.guidance={use='cfg', scale=2.0}"))[0]
    assert guided["calls_per_image"] == 8
    assert guided["network_calls"] == 2 * plain["network_calls"]
    anchored = tiny.lines(
        train("anchored", *shared, "image.regularizers=[{use='velocity_mse', weight=0.1}]")
    )[0]
    checked = 12 * 2  # the reference is replayed once more after the first update
    assert anchored["network_calls"] == plain["network_calls"] + 12 * 2 + checked


def test_the_summary_adds_up_and_keeps_what_came_before(train):
    first = train("first")
    second = train("second", f"start='{first}'")
    third = train("third", f"start='{second}'")
    summaries = [json.loads((run / "summary.json").read_text()) for run in (first, second, third)]
    rows = tiny.lines(first)
    assert summaries[0]["network_calls"] == sum(row["network_calls"] for row in rows)
    assert summaries[0]["tokens"] == sum(row["tokens"] for row in rows)
    assert [s["earlier"] and s["earlier"]["steps"] for s in summaries] == [None, 2, 4]
    calls = [summary["network_calls"] for summary in summaries]
    assert summaries[2]["earlier"]["network_calls"] == calls[0] + calls[1]
    hashes = [summary["hash"] for summary in summaries]
    assert [summary["start_hash"] for summary in summaries] == [None, *hashes[:2]]
    assert all(summary["cpu_s"] > summary["train_cpu_s"] for summary in summaries)


def test_a_cost_that_is_not_on_record_is_not_zero(train):
    first = train("first")
    summary = json.loads((first / "summary.json").read_text())
    del summary["tokens"]
    (first / "summary.json").write_text(json.dumps(summary))
    earlier = json.loads((train("second", f"start='{first}'") / "summary.json").read_text())[
        "earlier"
    ]
    assert (earlier["tokens"], earlier["steps"]) == (None, 2)
    (first / "summary.json").unlink()
    summary = json.loads((train("third", f"start='{first}'") / "summary.json").read_text())
    assert (summary["earlier"], summary["start_hash"]) == (None, None)


# --- stages -----------------------------------------------------------------------------------


def test_what_comes_after_another_needs_its_folder(train, tmp_path, checkpoint):
    file = tiny.recipe_file(tmp_path, checkpoint)
    with pytest.raises(UserError, match=r"name that run's folder with --set start=FOLDER"):
        train("alone", f"after='{file}'")
    assert not (tmp_path / "alone").exists()
    resolved = tiny.recipe(tmp_path, checkpoint, f"after='{file}'")
    assert "unigrpo ablate" in resolved.notes()[0]
    assert resolved.hash == tiny.recipe(tmp_path, checkpoint).hash
    train("second", f"after='{file}'", f"start='{train('first')}'")


def test_a_run_that_came_after_another_can_be_loaded_where_that_recipe_is_gone(
    train, tmp_path, checkpoint
):
    overrides = ["after='gone.toml'", f"start='{train('first')}'"]
    assert tiny.recipe(tmp_path, checkpoint, *overrides).recipe.after.endswith("gone.toml")


def test_after_names_a_file(tmp_path, checkpoint):
    with pytest.raises(RecipeError, match="after: should be a recipe's file, but there is no"):
        tiny.recipe(tmp_path, checkpoint, "after='nothing.toml'")
