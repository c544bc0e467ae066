"""A folder in the published layout, read as a policy, against outputs of the official code: images
drawn with guidance and decoded, and images looked at (``data/bagel_golden/README.md``)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import DATA, golden_folder, words
from PIL import Image
from safetensors.torch import load_file
from unigrpo_methods.guidance.cfg import CFG, CFGOptions
from unigrpo_methods.schedulers.ode import ODE, ODEOptions
from unigrpo_models.bagel.latents import patches
from unigrpo_models.bagel.looking import Resize, append_latents, append_views, vit_resize
from unigrpo_models.bagel.policy import load_bagel

from unigrpo_core.errors import UserError
from unigrpo_core.keys import Key, normals
from unigrpo_core.plugin import Placement
from unigrpo_core.records import Prompt, ReplayBatch, Sampling, TextSegment

CASES, SIZES = ("a", "b"), ("s0", "s1")
EVERYTHING = frozenset({"text", "image"})
PLACE = Placement(torch.device("cpu"), torch.float32, EVERYTHING)
BRIEF = Sampling(max_tokens=5)


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "golden.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return golden_folder(tmp_path_factory.mktemp("golden") / "BAGEL-tiny")


@pytest.fixture(scope="module")
def load(folder, golden):
    return lambda **options: load_bagel(folder, words(golden["system_ids"]), PLACE, **options)


@pytest.fixture(scope="module")
def policy(load):
    return load()


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def near(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def prompt(golden, case):
    return Prompt(case, words(golden[f"{case}.prompt_ids"]))


def thought(golden, cases, end):
    """Given thoughts, closed, as one segment."""
    rows = [[*golden[f"{case}.thought_ids"].tolist(), end] for case in cases]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return TextSegment(tokens, mask, torch.zeros(tokens.shape), ("",) * len(rows))


def full(policy, golden, cases):
    """System prompt, prompt and thought."""
    history = policy.open([prompt(golden, case) for case in cases])
    return policy.append(history, thought(golden, cases, policy.codec.eos))


def grid(golden, size, name):
    height, width = (side // 16 for side in golden[f"{size}.image_hw"].tolist())
    return golden[name].view(1, height, width, -1)


# --- drawing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_images(policy, golden, size):
    pixels = tuple(golden[f"{size}.image_hw"].tolist())
    latents = grid(golden, size, f"a.{size}.sample_cfg_global")
    assert policy.latent_shape(pixels) == latents.shape[1:]
    got = policy.decode(latents, pixels)
    close(got, (golden[f"ae.{size}.image"] * 0.5 + 0.5).clamp(0, 1))


@pytest.mark.parametrize(
    ("case", "size", "step", "name", "options"),
    [
        *[
            (case, size, step, f"v_cfg_{renorm}", {"renorm": renorm})
            for case in CASES
            for size in SIZES
            for step in range(3)
            for renorm in ("global", "text_channel")
        ],
        *[
            (case, size, 1, "v_cfg_channel", {"renorm": "channel"})
            for case in CASES
            for size in SIZES
        ],
        *[
            (case, size, 0, "v_cfg_global_min1", {"renorm": "global", "renorm_min": 1.0})
            for case in CASES
            for size in SIZES
        ],
        *[
            (case, size, 0, f"v_cfgimg_{renorm}", {"renorm": renorm, "image_scale": 1.5})
            for case in CASES
            for size in SIZES
            for renorm in ("global", "text_channel")
        ],
        *[
            ("b", "s1", 2, f"v_cfg_{renorm}_scale1p1", {"renorm": renorm, "scale": 1.1})
            for renorm in ("global", "channel", "text_channel")
            if renorm != "channel"
        ],
        ("b", "s1", 2, "v_cfg_channel_scale1p1", {"renorm": "channel", "scale": 1.1}),
    ],
)
def test_guided_velocities(golden, case, size, step, name, options):
    """Both cases side by side: what one image's norm is does not depend on the other."""
    guidance = CFG(CFGOptions(**{"scale": 4.0, **options}))
    v, prompted = (
        torch.stack([golden[f"{row}.{size}.t{step}.{which}"] for row in CASES])[:, None]
        for which in ("v_cond", "v_prompt_only")
    )
    unconditional = golden[f"{size}.t{step}.v_uncond_sys"].expand(v.shape)
    t = golden["timesteps"][step].float().expand(2, 1)
    got = guidance.combine(v, {"text": unconditional, "image": prompted}, t)
    close(got[CASES.index(case), 0], golden[f"{case}.{size}.t{step}.{name}"])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cfg_global", {"renorm": "global", "interval": (0.5, 1.0)}),
        ("cfg_text_channel", {"renorm": "text_channel"}),
    ],
)
def test_guided_sampling(policy, golden, size, name, options):
    """The five Euler steps of both cases at once, with the policy's own branches."""
    scheduler, guidance = ODE(ODEOptions()), CFG(CFGOptions(scale=4.0, **options))
    times, history = scheduler.times(5, 3.0).float(), full(policy, golden, CASES)
    branches = policy.branches(history, guidance.branches)
    x = grid(golden, size, f"{size}.noise").repeat(2, 1, 1, 1)
    recorded = size == "s0" and name == "cfg_global"
    for step in range(5):
        now, then = (times[k].expand(2, 1) for k in (step, step + 1))
        v = policy.velocity(history, x, now[:, 0])[:, None]
        free = {key: policy.velocity(b, x, now[:, 0])[:, None] for key, b in branches.items()}
        v = guidance.combine(v, free, now)
        if recorded:
            close(x[0].flatten(0, 1), golden["a.s0.traj_x_cfg_global"][step])
            close(v[0, 0].flatten(0, 1), golden["a.s0.traj_v_cfg_global"][step])
        x = scheduler.transition(v, x[:, None], now, then, torch.zeros(2, 1)).mean[:, 0]
    for row, case in enumerate(CASES):
        close(x[row].flatten(0, 1), golden[f"{case}.{size}.sample_{name}"])
    if recorded:
        close(x[0].flatten(0, 1), golden["a.s0.traj_x_cfg_global"][5])


# --- unconditional contexts -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "branch", "name"),
    [
        ({}, "text", "{size}.t{k}.v_uncond_sys"),
        ({"text_branch": "empty"}, "text", "{size}.t{k}.v_uncond_empty"),
        ({}, "image", "{case}.{size}.t{k}.v_prompt_only"),
    ],
)
def test_branches_in_sampling_and_in_replay(load, golden, options, branch, name):
    policy = load(**options)
    cases = ("a", "b", "a")
    history = full(policy, golden, cases)
    x_t = torch.stack([grid(golden, "s1", f"s1.x_t{k}")[0] for k in range(3)]).expand(
        3, -1, -1, -1, -1
    )
    t = golden["timesteps"].float().expand(3, 3)
    context = policy.branches(history, (branch,))[branch]
    said = thought(golden, cases, policy.codec.eos)
    with torch.no_grad():
        replay = policy.root(
            ReplayBatch(
                prompts=tuple(prompt(golden, case) for case in cases),
                tokens=said.tokens,
                mask=said.mask,
                temperature=1.0,
                want_logps=False,
                x_t=x_t,
                t=t,
                branches=(branch,),
                context_gradient=True,
            )
        )
    assert set(replay.branches) == {branch}
    for k in range(3):
        sampled = policy.velocity(context, x_t[:, k], t[:, k])
        near(replay.branches[branch][:, k], sampled)
        for row, case in enumerate(cases):
            wanted = golden[name.format(case=case, size="s1", k=k)]
            close(sampled[row].flatten(0, 1), wanted)


def test_a_branch_that_is_none(policy, golden):
    with pytest.raises(UserError, match="no unconditional context 'blank'"):
        policy.branches(full(policy, golden, "a"), ("blank",))


# --- looking ----------------------------------------------------------------------------------


def edit(policy, golden):
    """System prompt, an image's latents and views, and the prompt of case a."""
    drawn = policy.autoencoder.encode(golden["edit.vae_image"][None], golden["edit.vae_eps"])
    close(drawn, golden["edit.vae_latent"])
    network, codec = policy.network, policy.codec
    with torch.no_grad():
        history = append_latents(network, codec, policy.start(1), patches(2, drawn), [b"x"])
        history = append_views(network, codec, history, golden["edit.vit_image"][None], [b"x"])
    return policy.tell(history, [prompt(golden, "a")])


def test_what_the_vit_sees(policy, golden):
    network, image = policy.network, golden["edit.vit_image"][None]
    seen = patches(14, image)
    close(seen[0].flatten(0, 1), golden["edit.vit_patches"])
    features = network.vit_model.vision_model(seen.flatten(1, 2), golden["edit.vit_pos_ids"])
    close(features[0], golden["edit.vit_features"])
    close(network.connector(features)[0], golden["edit.connector_out"])
    places = network.vit_pos_embed.pos_embed[golden["edit.vit_pos_ids"]]
    close(network.embed_image(image)[0], golden["edit.connector_out"] + places)
    assert network.table_rows(3, 2).tolist() == golden["edit.vae_pos_ids"].tolist()


def test_editing_contexts(policy, golden):
    history = edit(policy, golden)
    branches = policy.branches(history, ("text", "image"))
    contexts = (history, branches["text"], branches["image"])
    places = [n for c in contexts for n in (*c.positions, *c.lengths)]
    assert places == golden["edit.rope_and_len"].tolist()
    for layer, (k, v) in enumerate(history.caches):
        close(k[0].transpose(0, 1), golden["edit.kv_k"][layer])
        close(v[0].transpose(0, 1), golden["edit.kv_v"][layer])


@pytest.mark.parametrize("step", [0, 1])
def test_editing_velocities(policy, golden, step):
    history = edit(policy, golden)
    guidance = CFG(CFGOptions(scale=4.0, image_scale=2.0, renorm="text_channel"))
    x_t, t = grid(golden, "s1", f"s1.x_t{step}"), golden["timesteps"][step].float().view(1)
    v = policy.velocity(history, x_t, t)
    close(v[0].flatten(0, 1), golden[f"edit.s1.t{step}.v_cond"])
    branches = {
        name: policy.velocity(branch, x_t, t)[:, None]
        for name, branch in policy.branches(history, guidance.branches).items()
    }
    guided = guidance.combine(v[:, None], branches, t[:, None])
    close(guided[0, 0].flatten(0, 1), golden[f"edit.s1.t{step}.v_cfgimg_text_channel"])


def pictures(count, height=64, width=80):
    drawn = normals([Key(("picture", row)) for row in range(count)], (3, height, width), "cpu")
    return (0.5 + 0.2 * drawn).clamp(0, 1)


def keys(count):
    return [Key(("look", row)) for row in range(count)]


def test_looking_resizes_draws_and_appends_both_blocks(policy, golden):
    """Step by step: the size of drawing, the keyed draw, a block of latents, one of views."""
    pictured = pictures(2, 48, 60)
    images, start = pictured, policy.open([prompt(golden, case) for case in CASES])
    history = policy.look(start, images, keys(2))
    images = Resize(16, 64, 128)(images)
    assert images.shape[2:] == (64, 80)
    eps = normals([key.child("encode") for key in keys(2)], (16, 8, 10), "cpu")
    latents = patches(2, policy.autoencoder.encode(2 * images - 1, eps))
    views = 2 * vit_resize(policy.network.config)(images) - 1
    assert views.shape[2:] == (56, 84)
    with torch.no_grad():
        expected = append_latents(policy.network, policy.codec, start, latents, [b"0", b"1"])
        expected = append_views(policy.network, policy.codec, expected, views, [b"0", b"1"])
    assert history.lengths == expected.lengths
    assert history.positions == expected.positions
    for row, length in enumerate(history.lengths):
        assert length == len(start.ids[row]) + (4 * 5 + 2) + (4 * 6 + 2)
        for got, wanted in zip(history.caches, expected.caches, strict=True):
            for k, own in zip(got, wanted, strict=True):
                near(k[row, :, :length], own[row, :, :length])
        kept = [item.content for item in history.ids[row][-2:]]
        near(kept[0], latents[row])
        near(kept[1], views[row])
    again = policy.look(start, pictured, [Key(("other",)), keys(2)[1]])
    assert [a == b for a, b in zip(again.ids, history.ids, strict=True)] == [False, True]


def test_rows_that_saw_the_same_are_equal(policy, golden):
    start = policy.open([prompt(golden, case) for case in "aab"])
    same = pictures(1).expand(3, -1, -1, -1)
    assert policy.look(start, same, [keys(1)[0]] * 3).equals == (0, 0, 2)
    assert policy.look(start, same, keys(3)).equals == (0, 1, 2)
    assert policy.look(start, pictures(3), [keys(1)[0]] * 3).equals == (0, 1, 2)


def told(policy, golden, order, rows):
    """A history for some rows of three: images before the prompt ("edit"), after it, or after a
    thought ("rounds")."""
    cases = [("a", "b", "b")[row] for row in rows]
    prompts = [prompt(golden, case) for case in cases]
    images, draws = pictures(3)[rows], [keys(3)[row] for row in rows]
    if order == "edit":
        return policy.tell(policy.look(policy.start(len(rows)), images, draws), prompts)
    history = policy.open(prompts)
    if order == "rounds":
        _, history = policy.write(history, BRIEF, [Key(("first", row)) for row in rows])
    return policy.look(history, images, draws)


@pytest.mark.parametrize("order", ["edit", "after", "rounds"])
def test_writing_and_drawing_go_on_after_images_in_batches_as_alone(policy, golden, order):
    every = [0, 1, 2]
    start = told(policy, golden, order, every)
    before = [[k.clone() for k in pair] for pair in start.caches]
    names = [Key(("write", row)) for row in every]
    segment, history = policy.write(start, BRIEF, names)
    assert len(set(history.lengths)) > 1, "the rows should differ in length"
    x_t, t = normals(names, (3, 5, 64), "cpu"), torch.tensor([0.9, 0.5, 0.2])
    together = policy.velocity(history, x_t, t)
    near(policy.velocity(policy.append(start, segment), x_t, t), together)
    branches = policy.branches(history, ("text", "image"))
    free = {name: policy.velocity(branch, x_t, t) for name, branch in branches.items()}
    for row in every:
        alone = told(policy, golden, order, [row])
        said, own = policy.write(alone, BRIEF, names[row : row + 1])
        count = int(said.mask.sum())
        assert said.tokens[0, :count].tolist() == segment.tokens[row][segment.mask[row]].tolist()
        near(said.logps[0, :count], segment.logps[row, :count])
        assert own.ids[0] == history.ids[row]
        here = slice(row, row + 1)
        near(policy.velocity(own, x_t[here], t[here])[0], together[row])
        for name, branch in policy.branches(own, ("text", "image")).items():
            near(policy.velocity(branch, x_t[here], t[here])[0], free[name][row])
    index = torch.tensor([2, 0, 2])
    near(policy.velocity(history.rows(index), x_t[index], t[index]), together[index])
    for pair, kept in zip(start.caches, before, strict=True):
        assert all(torch.equal(k, old) for k, old in zip(pair, kept, strict=True))


@pytest.mark.parametrize(
    ("order", "known"), [("edit", "image"), ("after", "prompt"), ("rounds", "thought")]
)
def test_what_the_branches_know_after_images(policy, golden, order, known):
    """Branch "text" stands before the last prompt, or on all up to a later image; "image" knows the
    prompts alone."""
    history = told(policy, golden, order, [0, 1])
    _, history = policy.write(history, BRIEF, keys(2))
    branches = policy.branches(history, ("text", "image"))
    system = len(policy.codec.system)
    for row, items in enumerate(history.ids):
        free = branches["text"].ids[row]
        images = [place for place, item in enumerate(items) if not isinstance(item, int)]
        ends = {"image": system + 2, "prompt": images[-1] + 1, "thought": images[-1] + 1}
        assert free == items[: ends[known]]
        assert branches["image"].ids[row] == policy.open([prompt(golden, CASES[row])]).ids[0]
        lengths = branches["text"].lengths[row]
        assert lengths == len(free) - 2 + sum(items[place].slots for place in images)


def test_the_vit_alone(load, golden):
    policy = load(look="vit")
    start = policy.start(1)
    history = policy.look(start, pictures(1), keys(1))
    assert history.positions[0] == start.positions[0] + 1
    assert history.lengths[0] == start.lengths[0] + 4 * 6 + 2
    assert policy.look(start, pictures(1), [Key(("other",))]).ids == history.ids


def test_bfloat16_is_as_near_as_the_official_one(folder, golden):
    """The official code in bfloat16 is 0.8 to 0.9 % off its float32 velocities."""
    system = words(golden["system_ids"])
    coarse = load_bagel(folder, system, Placement(PLACE.device, torch.bfloat16, EVERYTHING))
    exact = load_bagel(folder, system, PLACE)

    def distance(got, expected):
        return ((got - expected).norm() / expected.norm()).item()

    history = full(coarse, golden, "a")
    for k, t in enumerate(golden["timesteps"].float()):
        v = coarse.velocity(history, grid(golden, "s0", f"s0.x_t{k}"), t.view(1)).view(16, 64)
        assert distance(v, golden[f"a.s0.t{k}.v_cond"]) < 0.01
        assert distance(v, golden[f"bf16.a.s0.t{k}.v_cond"].float()) < 0.015
    segment, _ = exact.write(told(exact, golden, "edit", [0, 1]), BRIEF, keys(2))
    x_t, t = normals(keys(2), (3, 5, 64), "cpu"), torch.tensor([0.9, 0.5])
    v, expected = (
        policy.velocity(policy.append(told(policy, golden, "edit", [0, 1]), segment), x_t, t)
        for policy in (coarse, exact)
    )
    assert 0 < distance(v, expected) < 0.01
    coarse.write(told(coarse, golden, "edit", [0, 1]), BRIEF, keys(2))


def test_a_thought_after_an_image_is_what_one_pass_would_say(policy, golden):
    """Log-probs of sampled tokens against the same tokens read at once over the same cache."""
    start = told(policy, golden, "edit", [0, 1])
    segment, _ = policy.write(start, BRIEF, keys(2))
    codec, network = policy.codec, policy.network
    for row in range(2):
        said = segment.tokens[row][segment.mask[row]].tolist()
        logits, history = [], start.rows(torch.tensor([row]))
        caches = list(history.grown(history.lengths[0] + len(said)).caches)
        with torch.no_grad():
            for turn, token in enumerate([codec.bos, *said[:-1]]):
                slot = history.lengths[0] + turn
                padding = torch.zeros(1, 1, 1, slot + 1)
                place = torch.tensor([history.positions[0] + turn])
                hidden = network.step(
                    torch.tensor([token]), place, caches, padding, torch.tensor([slot])
                )
                logits.append(network.language_model.lm_head(hidden)[0])
        allowed = codec.allowed(torch.device("cpu"))
        logps = torch.stack(logits).masked_fill(~allowed, float("-inf")).log_softmax(1)
        near(segment.logps[row, : len(said)], logps[range(len(said)), said])


def test_a_training_step_trains_no_eye(policy):
    owned = policy.parameters()
    named = dict(policy.root.named_parameters())
    free = named.keys() - owned["text"].keys() - owned["image"].keys()
    assert {name.split(".")[1] for name in free} == {
        *("latent_pos_embed", "vit_pos_embed", "vit_model", "connector")
    }
    assert not any(named[name].requires_grad for name in free)
    assert all(named[name].requires_grad for name in named.keys() - free)


# --- the rule of sizes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "latents", "views"),
    [
        ((1024, 1024), (1024, 1024), (980, 980)),
        ((512, 768), (512, 768), (518, 770)),
        ((100, 200), (512, 1024), (490, 980)),
        ((3000, 4000), (768, 1024), (728, 980)),
        ((4000, 400), (1024, 96), (980, 98)),
        ((640, 480), (688, 512), (686, 518)),
    ],
)
def test_released_sizes(size, latents, views):
    assert Resize(16, 512, 1024).size(*size) == latents
    assert Resize(14, 224, 980).size(*latents) == views


@pytest.mark.parametrize("size", [(48, 60), (100, 200), (300, 170)])
def test_resizing_is_that_of_pil(size):
    drawn = 0.3 + 0.4 * normals([Key(("noise",))], (3, *size), "cpu").sigmoid()
    eight_bits = (drawn * 255).round().to(torch.uint8)
    got = Resize(16, 64, 128)(eight_bits / 255)[0].permute(1, 2, 0)
    picture = Image.fromarray(eight_bits[0].permute(1, 2, 0).numpy())
    resized = picture.resize((got.shape[1], got.shape[0]), Image.Resampling.BICUBIC)
    wanted = torch.from_numpy(np.asarray(resized) / 255).float()
    torch.testing.assert_close(got, wanted, atol=1.5 / 255, rtol=0)


# --- mistakes ---------------------------------------------------------------------------------


def test_a_model_without_eyes(setup):
    policy = setup().policy
    with pytest.raises(UserError, match=r"does not look at images: .* no vit_config\.json"):
        policy.look(policy.start(1), pictures(1), keys(1))


@pytest.mark.parametrize("size", [(72, 64), (64, 144), (0, 64)])
def test_sizes_that_cannot_be_drawn(policy, size):
    with pytest.raises(UserError, match="this model draws multiples of 16 pixels up to 128"):
        policy.latent_shape(size)


def test_contexts_that_become_too_long(policy, golden):
    short = shortened(policy, 40)
    message = "an image of 24 tokens makes a context of 55; the model's ends at 40"
    with pytest.raises(UserError, match=message):
        short.look(short.start(1), pictures(1), keys(1))
    history = shortened(policy, 20).start(1)
    with pytest.raises(UserError, match=r"prompt 'b' makes a context of 21 tokens; .* ends at 20"):
        shortened(policy, 20).tell(history, [prompt(golden, "b")])


def shortened(policy, length):
    """The same policy with a shorter context."""
    codec = replace(policy.codec, max_length=length)
    return type(policy)(
        policy.network, codec, policy.folder, policy.place, autoencoder=policy.autoencoder
    )
