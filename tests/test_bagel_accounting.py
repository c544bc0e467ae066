"""The accounting of BAGEL's passes: against torch's own counter, the tensors, and a plan's figures.

torch counts matrix products, the causal attention as a full rectangle, and with the plain kernel
(``SDPBackend.MATH``) attention's gradient as twice its forward: with these two conventions the
counts are equal, not close.
"""

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from unigrpo_models.bagel import accounting
from unigrpo_models.bagel.accounting import Work
from unigrpo_models.bagel.config import BagelConfig, LanguageConfig, Latent
from unigrpo_models.bagel.network import BagelNetwork

CONFIG = BagelConfig(
    llm=LanguageConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    latent=Latent(space="pixels", patch=4, channels=3, max_size=6),
)
ROWS, TOKENS, POINTS, GRID = 3, 7, 2, (2, 5)
LATENTS = GRID[0] * GRID[1]
BOTH = frozenset({"text", "image"})
PUBLISHED = BagelConfig.published()


@pytest.fixture
def network():
    torch.manual_seed(0)
    return BagelNetwork(CONFIG)


def counted(call):
    """The FLOPs of a call, by torch."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def ids(rows=ROWS, tokens=TOKENS):
    return torch.arange(rows * tokens).view(rows, tokens) % CONFIG.llm.vocab_size


def boundary():
    return torch.tensor([[1, 2]])


# --- FLOPs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True])
def test_prefill(network, head):
    def read():
        states, _ = network.text(ids(), want_hidden=head)
        if head:
            network.language_model.lm_head(states[:, -1])

    work = accounting.prefill(CONFIG, ROWS, TOKENS, head=head, rectangles=True)
    assert counted(read) == work.flops


def test_prefill_counts_the_pairs_that_see_each_other():
    seen, all_ = (
        accounting.prefill(CONFIG, 1, TOKENS, head=True, rectangles=r).flops for r in (False, True)
    )
    assert all_ - seen == TOKENS * (TOKENS - 1) / 2 * accounting.pair_flops(CONFIG)


def test_decode_step(network):
    _, caches = network.text(ids())
    padding = torch.zeros(ROWS, 1, 1, TOKENS)

    def step():
        hidden = network.step(ids()[:, 0], torch.full((ROWS,), TOKENS - 1), caches, padding)
        network.language_model.lm_head(hidden)

    assert counted(step) == accounting.decode_step(CONFIG, ROWS, TOKENS).flops


def draw(network, caches, owner=None, frozen=False):
    """Velocities of every image over its text."""
    images = ROWS if owner is None else len(owner)
    return network.velocity(
        torch.randn(images, LATENTS, CONFIG.latent.token_width),
        torch.rand(images),
        network.table_rows(*GRID),
        boundary(),
        torch.full((ROWS,), TOKENS),
        caches,
        None,
        owner,
        frozen=frozen,
    )


def test_velocity(network):
    _, caches = network.text(ids(), want_hidden=False)
    work = accounting.velocity(CONFIG, ROWS, LATENTS, TOKENS)
    assert counted(lambda: draw(network, caches)) == work.flops


def replay(network, *, scored, points, context_gradient=True, backward=False):
    """As the trainer's pass, on equal lengths."""
    states, caches = network.text(ids(), want_hidden=scored)
    loss = torch.zeros(())
    if scored:
        loss = loss + network.language_model.lm_head(states).logsumexp(2).sum()
    if points:
        if not context_gradient:
            caches = [(k.detach(), v.detach()) for k, v in caches]
        owner = torch.arange(ROWS).repeat_interleave(points)
        loss = loss + draw(network, caches, owner, not context_gradient).square().sum()
    if backward:
        loss.backward()


def train_only(network, experts, adapters=()):
    """Leaves gradients to these experts; those with "adapters" train their norms alone, so that
    the gradient flows through frozen matrices as it does with adapters."""
    for name, parameter in network.named_parameters():
        image = any(p in name for p in ("_moe_gen", "time_embedder", "vae2llm", "llm2vae"))
        expert = "image" if image else "text"
        trained = expert in experts and "pos_embed" not in name
        parameter.requires_grad_(trained and (expert not in adapters or "norm" in name))


@pytest.mark.parametrize(("scored", "points"), [(True, 0), (True, POINTS), (False, POINTS)])
def test_replay_forward(network, scored, points):
    work = accounting.replay(
        CONFIG, ROWS, TOKENS, points, LATENTS, scored=ROWS * TOKENS * scored, rectangles=True
    )
    with torch.no_grad():
        assert counted(lambda: replay(network, scored=scored, points=points)) == work.flops


@pytest.mark.parametrize(
    ("train", "adapters", "scored", "points", "context_gradient"),
    [
        (BOTH, (), True, POINTS, True),
        (BOTH, (), False, POINTS, True),
        (BOTH, (), True, POINTS, False),
        (BOTH, BOTH, True, POINTS, True),
        (BOTH, BOTH, True, POINTS, False),
        ({"image"}, (), False, POINTS, False),
        ({"image"}, {"image"}, False, POINTS, False),
        ({"text"}, (), True, 0, True),
        ({"text"}, {"text"}, True, 0, True),
    ],
)
def test_replay_forward_and_backward(network, train, adapters, scored, points, context_gradient):
    train_only(network, train, adapters)
    work = accounting.replay(
        CONFIG,
        ROWS,
        TOKENS,
        points,
        LATENTS,
        scored=ROWS * TOKENS * scored,
        train=train,
        lora=adapters,
        context_gradient=context_gradient,
        attention_backward=2.0,
        rectangles=True,
    )
    found = counted(
        lambda: replay(
            network, scored=scored, points=points, context_gradient=context_gradient, backward=True
        )
    )
    # Where nothing flows to the boundary tokens' embeddings, torch counts the inner products in
    # the gradient of a norm too, since there they run as a batched product.
    inner = 0 if context_gradient else 2 * ROWS * points * accounting.BOUNDARY * 32
    assert found == work.flops + inner


def test_recomputing_adds_the_layers_once():
    plain, again = (
        accounting.replay(CONFIG, 1, 9, 2, 4, scored=9, train=BOTH, recompute=r).flops
        for r in (False, True)
    )
    layers = accounting.replay(CONFIG, 1, 9, 2, 4, scored=9).flops
    head = 2 * 9 * accounting.parameters(CONFIG)["head"]
    assert again - plain == layers - head


# --- bytes ------------------------------------------------------------------------------------


def read_by(network, outputs):
    """The numbers of all weights that outputs depend on, without embeddings and tables."""
    torch.stack([x.sum() for x in outputs]).sum().backward()
    return sum(
        p.numel()
        for name, p in network.named_parameters()
        if p.grad is not None and "embed" not in name.replace("time_embedder", "")
    )


def test_weights_are_read_once(network):
    width, size = CONFIG.llm.hidden_size, 4
    cache = accounting.cache_bytes(CONFIG, ROWS, TOKENS, size)

    def weights(work, embedded, cached=cache):
        return (work.bytes - cached) / size - embedded * width

    _, caches = network.text(ids(), want_hidden=False)
    work = accounting.prefill(CONFIG, ROWS, TOKENS, itemsize=size)
    assert weights(work, ROWS * TOKENS) == read_by(network, [x for kv in caches for x in kv])

    network.zero_grad()
    states, caches = network.text(ids())
    logits = network.language_model.lm_head(states[:, -1:])
    work = accounting.prefill(CONFIG, ROWS, TOKENS, head=True, itemsize=size)
    assert weights(work, ROWS * TOKENS) == read_by(network, [logits])

    network.zero_grad()
    slots, padding = [(k.detach(), v.detach()) for k, v in caches], torch.zeros(ROWS, 1, 1, TOKENS)
    hidden = network.step(ids()[:, 0], torch.full((ROWS,), TOKENS - 1), slots, padding)
    work = accounting.decode_step(CONFIG, ROWS, TOKENS, itemsize=size)
    assert weights(work, ROWS) == read_by(network, [network.language_model.lm_head(hidden)])

    network.zero_grad()
    _, caches = network.text(ids(), want_hidden=False)
    v = draw(network, [(k.detach(), v.detach()) for k, v in caches])
    work = accounting.velocity(CONFIG, ROWS, LATENTS, TOKENS, itemsize=size)
    assert weights(work, 2 + LATENTS) == read_by(network, [v])


def test_the_cache_is_as_large_as_its_tensors(network):
    _, caches = network.text(ids())
    assert sum(x.nbytes for kv in caches for x in kv) == accounting.cache_bytes(
        CONFIG, ROWS, TOKENS, 4
    )


def test_parameters_are_those_of_the_network(network):
    found = dict.fromkeys(("text", "embedding", "head", "image", "tables", "vision"), 0)
    image = ("_moe_gen", "time_embedder", "vae2llm", "llm2vae")
    for name, parameter in network.named_parameters():
        which = (
            "embedding"
            if "embed_tokens" in name
            else "head"
            if "lm_head" in name
            else "tables"
            if "pos_embed" in name
            else "image"
            if any(part in name for part in image)
            else "text"
        )
        found[which] += parameter.numel()
    assert accounting.parameters(CONFIG) == found


def test_adapters():
    """Rank 2 on every matrix, and on one."""
    matrices = [
        module
        for name, module in BagelNetwork(CONFIG).language_model.model.layers.named_modules()
        if isinstance(module, torch.nn.Linear) and "_moe_gen" not in name
    ]
    sides = sum(m.in_features + m.out_features for m in matrices)
    assert accounting.adapter_parameters(CONFIG, 2) == 2 * sides
    assert accounting.adapter_parameters(CONFIG, 2, ["q_proj"]) == 2 * 3 * 64
    assert accounting.trained_parameters(CONFIG, BOTH, {"image"}, rank=2) == (
        accounting.owned(CONFIG, "text") + 2 * sides
    )


# --- activations ------------------------------------------------------------------------------


def kept(call, network, weights):
    """Bytes that autograd keeps of a call, without the weights and what autocast casts of them."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    found, alive = {}, []

    def pack(x):
        storage = x.untyped_storage()
        cast = x.dtype == torch.bfloat16 and {tuple(x.shape), tuple(x.shape[::-1])} & weights
        if storage.data_ptr() not in own and not cast:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive.append(call())
    return sum(found.values())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("image", [False, True])
def test_activations_are_what_autograd_keeps(dtype, size, image):
    """Of the layers: the difference of two networks. An image's tokens keep a little more, their
    own copy of the keys and values that they see."""
    tokens, found = 36, []
    for layers in (2, 4):
        llm = CONFIG.llm.model_copy(update={"num_hidden_layers": layers})
        config = CONFIG.model_copy(update={"llm": llm})
        network = BagelNetwork(config)
        network.latent_pos_embed.requires_grad_(False)
        weights = {tuple(p.shape) for n, p in network.named_parameters() if "pos_embed" not in n}
        with torch.no_grad():
            _, caches = network.text(ids(1, 2))

        def call(network=network, caches=caches):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                if not image:
                    return network.text(ids(1, tokens))
                x, rows = torch.randn(1, tokens, 48), network.table_rows(6, 6)
                at = torch.tensor([2])
                return network.velocity(x, torch.ones(1), rows, boundary(), at, caches, None)

        found.append(kept(call, network, weights))
    config = CONFIG.model_copy(
        update={"llm": CONFIG.llm.model_copy(update={"num_hidden_layers": 2})}
    )
    expected = accounting.activation_bytes(config, tokens, size)
    copies = 1.25 if image else 1.0
    assert expected <= found[1] - found[0] <= copies * expected


def test_checkpointing_keeps_less():
    none, selective, full = (
        accounting.activation_bytes(PUBLISHED, 1, 2, mode) for mode in ("none", "selective", "full")
    )
    assert none > 2 * full
    assert full < selective < none


# --- the published model ----------------------------------------------------------------------


def tera(work):
    return work.flops / 1e12


def test_constants_of_the_published_model():
    """Of the plan that the project's GPU figures are held against."""
    counts = accounting.parameters(PUBLISHED)
    layers = 2 * PUBLISHED.llm.num_hidden_layers * accounting._Layer.of(PUBLISHED.llm).macs
    assert round(layers / 1e9, 2) == 13.05
    assert round(2 * counts["head"] / 1e9, 2) == 1.09
    assert accounting.pair_flops(PUBLISHED) == 401_408
    assert accounting.cache_bytes(PUBLISHED, 1, 1) == 57_344
    step = accounting.decode_step(PUBLISHED, 1, 344)
    assert round(step.flops / 1e9, 1) == 14.3
    assert round((step.bytes - 344 * 57_344) / 1e9, 2) == 14.14
    assert round(tera(accounting.prefill(PUBLISHED, 8, 88, head=True)), 1) == 9.2
    assert round(accounting.optimizer(PUBLISHED, BOTH).bytes / 1e9) == 481


@pytest.mark.parametrize(
    ("latents", "step", "forward", "both", "lora", "recompute", "reference"),
    [
        (1024, 14.06, 50.6, 153.0, 104.4, 203.0, 50.1),
        (4096, 61.2, 192.1, 587.9, 419.1, 779.4, 191.5),
    ],
)
def test_images_of_the_published_model(latents, step, forward, both, lora, recompute, reference):
    """512 and 1024 pixels, a thought of 512 tokens, 3 trained steps, in TFLOP."""
    digits = 2 if latents == 1024 else 1
    assert round(tera(accounting.velocity(PUBLISHED, 1, latents, 600)), digits) == step

    def replayed(**options):
        return tera(accounting.replay(PUBLISHED, 1, 600, 3, latents, scored=512, **options))

    assert round(replayed(), 1) == forward
    assert replayed(train=BOTH) == pytest.approx(both, abs=0.06)
    assert replayed(train=BOTH, lora=BOTH) == pytest.approx(lora, abs=0.06)
    assert replayed(train=BOTH, recompute=True) == pytest.approx(recompute, abs=0.06)
    # The last layer's text has only keys and values where no log-prob is wanted: 0.28 less.
    bare = tera(accounting.replay(PUBLISHED, 1, 600, 3, latents))
    assert reference - 0.32 < bare < reference


def test_the_roofline_is_the_slower_of_the_two():
    assert Work(8.0, 3.0).seconds(4.0, 1.0) == 3.0
    assert (Work(4.0, 0.5) * 2 + Work(0.0, 1.0)).seconds(4.0, 1.0) == 2.0


def test_no_torch():
    code = "import sys, unigrpo_models.bagel.account; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
