"""How a policy computes: recomputed activations, compiled units, a reference on the host."""

import time

import pytest
import tiny
import torch
from torch import nn
from unigrpo_models.bagel.policy import load_bagel
from unigrpo_models.compiled import compile_units
from unigrpo_models.weights import WeightSets

from unigrpo_core.keys import Key, normals
from unigrpo_core.plugin import Files, Placement, local_folder
from unigrpo_core.records import Prompt, ReplayBatch, Sampling

BOTH = frozenset({"text", "image"})
MSE = 'image.regularizers=[{use="velocity_mse",weight=0.1}]'


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def policy(checkpoint, **options):
    return load_bagel(
        checkpoint, "", Placement(torch.device("cpu"), torch.float32, BOTH, **options)
    )


def replay(built):
    """Some loss of a replay, its gradients, and the bytes that its backward kept."""
    built.root.zero_grad()
    history = built.open(tiny.prompts(2))
    segment, _ = built.write(history, Sampling(4), [Key((row,)) for row in range(2)])
    batch = ReplayBatch(
        prompts=tiny.prompts(2),
        tokens=segment.tokens,
        mask=segment.mask,
        temperature=1.0,
        want_logps=True,
        x_t=normals([Key(("x", row)) for row in range(2)], (2, 2, 3, 48), "cpu"),
        t=torch.tensor([[0.9, 0.3]]).repeat(2, 1),
        branches=(),
        context_gradient=True,
    )
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        found = built.root(batch)
    (found.logps.sum() + found.velocities.square().sum()).backward()
    weights = {p.untyped_storage().data_ptr() for p in built.root.parameters()}
    size = sum(bytes_ for place, bytes_ in kept.items() if place not in weights)
    return found, {n: p.grad for n, p in built.root.named_parameters() if p.grad is not None}, size


def test_recomputed_activations_give_the_same_gradients_and_keep_less(checkpoint):
    sizes = {}
    for mode in ("none", "selective", "full"):
        built = policy(checkpoint, checkpointing=mode)
        found, gradients, sizes[mode] = replay(built)
        if mode == "none":
            expected = found, gradients
        assert torch.equal(found.velocities, expected[0].velocities)
        assert gradients.keys() == expected[1].keys()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected[1][name]), (mode, name)
    assert sizes["full"] < 0.5 * sizes["none"]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_a_run_with_recomputed_activations_is_the_run_without(checkpoint, tmp_path, mode):
    plain = tiny.run(tmp_path, checkpoint, "steps=1", name="plain")
    less = tiny.run(tmp_path, checkpoint, "steps=1", f'compute.checkpointing="{mode}"', name="less")
    assert tiny.lines(plain) == tiny.lines(less)


def test_a_reference_on_the_host_is_the_same_reference(checkpoint, tmp_path):
    near = tiny.run(tmp_path, checkpoint, MSE, name="near")
    far = tiny.run(tmp_path, checkpoint, MSE, 'compute.reference="host"', name="far")
    assert tiny.lines(near) == tiny.lines(far)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kept_weights_wait_on_the_host_and_come_back_bit_for_bit(device):
    weight = nn.Parameter(torch.arange(3.0, device=device))
    sets = WeightSets({"w": weight}, host=True)
    sets.keep("reference")
    assert sets._kept["reference"]["w"].device.type == "cpu"
    with torch.no_grad():
        weight.add_(0.1)
    now = weight.detach().clone()
    with sets.use("reference"):
        assert weight.tolist() == [0.0, 1.0, 2.0]
    assert torch.equal(weight.detach(), now)


def test_every_pass_goes_through_the_units_that_are_declared(checkpoint):
    """Whoever wraps them sees sampling and training."""
    built = policy(checkpoint)
    (unit,) = built.wrap_units()
    units = [m for m in built.root.modules() if isinstance(m, unit)]
    assert len(units) == 2
    seen = []
    for module in units:
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].__name__))
    history = built.open(tiny.prompts(1))
    _, history = built.write(history, Sampling(3), [Key((0,))])
    built.velocity(history, torch.zeros(1, 2, 3, 48), torch.tensor([0.5]))
    assert set(seen) == {"text", "step", "image"}
    seen.clear()
    replay(built)
    assert seen.count("text") == 6  # opened; then contexts and thoughts; in two layers
    assert seen.count("image") == 2


def test_compiled_units_share_one_graph_of_a_pass_and_compute_the_same(checkpoint, monkeypatch):
    """Traced in whole; no code is generated, which would take minutes."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    original = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: original(self, backend=backend, **options)
    )
    plain, built = policy(checkpoint), policy(checkpoint, compile=True)
    compile_units(built.network.layers)  # the last one too: there are two in all
    expected, histories = [], [p.open(tiny.prompts(4)) for p in (plain, built)]
    for rows in (4, 3):  # another number of rows is no other graph
        x_t, t = normals([Key((row,)) for row in range(rows)], (2, 3, 48), "cpu"), torch.ones(rows)
        index = torch.arange(rows)
        v = [
            p.velocity(h.rows(index), x_t, t)
            for p, h in zip((plain, built), histories, strict=True)
        ]
        torch.testing.assert_close(*v, atol=1e-6, rtol=0)
        expected.append(len(graphs))
    assert expected[0] == expected[1] == 4  # text and image, and the last layer's of each


def test_a_group_decodes_in_an_eighth_of_its_single_decodes(tmp_path):
    """24 thoughts of one prompt on the embedded model, in CPU time, both sides in turns."""
    built = load_bagel(
        local_folder("checkpoint", "pkg:unigrpo_board/checkpoint", Files()),
        "",
        Placement(torch.device("cpu"), torch.float32, frozenset()),
    )
    history, sampling = built.open([Prompt("p", "two red circle")]), Sampling(24)
    keys = [Key((0, row)) for row in range(24)]
    together, alone = [], []
    for _ in range(2):
        start = time.process_time()
        group, _ = built.write(history.rows(torch.zeros(24, dtype=torch.int64)), sampling, keys)
        together.append(time.process_time() - start)
        start = time.process_time()
        single = [built.write(history, sampling, [key])[0] for key in keys]
        alone.append(time.process_time() - start)
    assert [text for one in single for text in one.texts] == list(group.texts)
    assert min(together) <= min(alone) / 8


def test_the_recipe_says_how_the_policy_computes(checkpoint, tmp_path):
    overrides = ('compute.checkpointing="full"', 'compute.reference="host"')
    built = tiny.setup(tmp_path, checkpoint, *overrides).policy
    assert built.place.checkpointing == built.network.checkpointing == "full"
    assert built.place.reference == "host"


@pytest.mark.parametrize("train", [BOTH, frozenset()])
def test_in_bf16_a_cache_has_one_type_and_grows_from_nothing(checkpoint, train):
    built = load_bagel(checkpoint, "", Placement(torch.device("cpu"), torch.bfloat16, train))
    sampling, keys = Sampling(3), [Key((row,)) for row in range(2)]
    for history in (built.open(tiny.prompts(2)), built.start(2)):
        _, longer = built.write(history, sampling, keys)
        for kept in (history, longer):
            assert {x.dtype for pair in kept.caches for x in pair} == {torch.bfloat16}
