"""What a policy that draws keeps: see ``ImageFlowPolicy`` in :mod:`unigrpo_core.interfaces`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import History, ImageFlowPolicy
from unigrpo_core.records import Prompt
from unigrpo_core.testing.policies import POINTS, PolicyConformance, gradients
from unigrpo_core.testing.samples import normal


class ImageFlowPolicyConformance(PolicyConformance):
    """Checks of a policy that draws; its facts are those of every policy."""

    def velocities(self, policy: ImageFlowPolicy, history: History) -> Tensor:
        """The sampler's velocities [B, K, *] at the points that replays are asked for."""
        x_t, t = self.noisy(policy)
        return torch.stack([policy.velocity(history, x_t[:, k], t[:, k]) for k in range(POINTS)], 1)

    # --- sizes and images ---------------------------------------------------------------------

    def test_sizes_are_numbers(self, component: ImageFlowPolicy) -> None:
        """``latent_shape`` is a tuple of ints >= 1, ``image_tokens`` an int >= 1, ``time_shift``
        above 0; an image of no pixels is refused with a UserError."""
        shape = component.latent_shape(self.size)
        assert isinstance(shape, tuple), f"{shape!r}"
        assert all(type(side) is int and side >= 1 for side in shape), f"latent shape {shape}"
        assert component.image_tokens(self.size) >= 1
        assert component.time_shift(self.size) > 0
        with pytest.raises(UserError):
            component.latent_shape((0, 0))

    def test_images_are_in_range(self, component: ImageFlowPolicy) -> None:
        """``decode`` gives float32 [B, 3, H, W] in [0, 1], each row's its own, also
        of latents that are too large."""
        latents = 3 * normal("latents", 3, *component.latent_shape(self.size))
        images = component.decode(latents, self.size)
        assert images.shape == (3, 3, *self.size), f"{tuple(images.shape)}"
        assert images.dtype == torch.float32, f"{images.dtype}"
        assert ((images >= 0) & (images <= 1)).all(), "a pixel is not in [0, 1]"
        assert not images.requires_grad, "decoding carries gradient"
        for row in range(3):
            alone = component.decode(latents[row : row + 1], self.size)[0]
            self.close(alone, images[row], f"image {row} alone:")

    def test_decoding_passes_the_gradient(self, component: ImageFlowPolicy) -> None:
        """The latents' gradient passes ``decode``, finite, each row's to its own."""
        latents = 0.3 * normal("latents", 2, *component.latent_shape(self.size))
        images = component.decode(latents.requires_grad_(), self.size)
        assert images.requires_grad, "decoding stops the gradient"
        (gradient,) = torch.autograd.grad(images[0].sum(), latents)
        assert torch.isfinite(gradient).all(), "the gradient is not finite"
        assert gradient[0].any(), "the gradient is 0 everywhere"
        assert not gradient[1].any(), "an image's gradient reaches the latents of another"

    # --- texts --------------------------------------------------------------------------------

    def test_what_is_cut_is_counted(self, component: ImageFlowPolicy) -> None:
        """Of texts that grow until they are refused, ``cut_tokens`` gives ints >= 0 by the same
        names, alike when asked again; a text that nothing is said to be left out of is read to its
        end: another end gives other velocities."""
        first, last, other = (prompt.text for prompt in self.prompts[:3])
        names = set(component.cut_tokens(self.prompts[0]))
        for times in (1, 2, 4, 8, 16, 32, 64, 128):
            texts = [" ".join((*[first] * times, end)) for end in (last, other)]
            prompts = [Prompt(f"long-{row}", text) for row, text in enumerate(texts)]
            try:
                for prompt in prompts:
                    component.prompt_tokens(prompt)
            except UserError:
                return
            lost = [component.cut_tokens(prompt) for prompt in prompts]
            assert lost == [component.cut_tokens(prompt) for prompt in prompts], "not alike"
            for found in lost:
                assert set(found) == names, f"{sorted(found)}, and {sorted(names)} of another text"
                assert all(type(n) is int and n >= 0 for n in found.values()), f"{found}"
            if any(any(found.values()) for found in lost):
                return
            x_t, t = (part[:1, 0] for part in self.noisy(component))
            one, two = (component.velocity(component.open([p]), x_t, t) for p in prompts)
            assert not torch.equal(one, two), f"it reads no end of {texts[0][:80]!r}, and is silent"

    # --- velocities ---------------------------------------------------------------------------

    def test_velocities_are_float32_of_the_latents_shape(self, component: ImageFlowPolicy) -> None:
        """Finite float32 [B, *], without gradient."""
        x_t, t = self.noisy(component)
        history = self.context(component).history
        v = component.velocity(history, x_t[:, 0], t[:, 0])
        assert v.shape == x_t[:, 0].shape, f"{tuple(v.shape)}"
        assert v.dtype == torch.float32, f"{v.dtype}"
        assert torch.isfinite(v).all(), "not finite"
        assert not v.requires_grad, "sampling carries gradient"

    def test_drawing_leaves_the_history_alone(self, component: ImageFlowPolicy) -> None:
        """A history gives the same velocities again, bit for bit."""
        history = self.context(component).history
        first = self.velocities(component, history)
        assert torch.equal(self.velocities(component, history), first)

    def test_velocity_rows_are_independent(self, component: ImageFlowPolicy) -> None:
        """A row's velocity is, to rounding, the same alone, in any order and beside any others."""
        history, (x_t, t) = self.context(component).history, self.noisy(component)
        together = component.velocity(history, x_t[:, 0], t[:, 0])
        for index in (torch.tensor([2, 0, 2, 1]), *torch.arange(len(x_t))[:, None]):
            found = component.velocity(history.rows(index), x_t[index, 0], t[index, 0])
            self.close(found, together[index], f"rows {index.tolist()}:")

    def test_replay_gives_the_samplers_velocities(self, component: ImageFlowPolicy) -> None:
        """The trainer's velocities [B, K, *] are the sampler's, to rounding."""
        context = self.context(component)
        with torch.no_grad():
            found = self.replay(component, context).velocities
        assert found is not None, "asked for velocities, it gives none"
        assert found.dtype == torch.float32, f"{found.dtype}"
        self.close(found, self.velocities(component, context.history), "trainer, sampler:")

    def test_velocities_are_left_out_if_not_wanted(self, component: ImageFlowPolicy) -> None:
        """Without x_t there are none."""
        replay = self.replay(component, self.context(component), x_t=None, t=None)
        assert replay.velocities is None, "not asked for, and given"
        assert not replay.branches, "not asked for, and given"

    # --- branches -----------------------------------------------------------------------------

    def test_branches_are_unconditional(self, component: ImageFlowPolicy) -> None:
        """Every branch that the provider names has a row per row, which knows nothing of its
        prompt: at one point all rows have one velocity. The branch "image" knows the prompt, and
        nothing of the thought: its velocities are those of the prompts as opened."""
        names, context = self.needed_branches(), self.context(component)
        x_t, t = (part[:1].expand_as(part) for part in self.noisy(component))
        found = component.branches(context.history, names)
        assert set(found) == set(names), f"asked for {names}, got {sorted(found)}"
        for name, history in found.items():
            assert len(history) == len(self.prompts), f"{name}: {len(history)} rows"
            v = component.velocity(history, x_t[:, 0], t[:, 0])
            expected = v[:1].expand_as(v)
            if name == "image":
                opened = component.open(context.prompts)
                expected = component.velocity(opened, x_t[:, 0], t[:, 0])
            self.close(v, expected, f"branch {name!r}:")

    def test_replay_gives_the_branches_velocities(self, component: ImageFlowPolicy) -> None:
        """The replay has the branches asked for and no others, equal to the sampler's."""
        names, context = self.needed_branches(), self.context(component)
        with torch.no_grad():
            assert not self.replay(component, context).branches, "not asked for, and given"
            found = self.replay(component, context, branches=names).branches
        assert set(found) == set(names), f"asked for {names}, got {sorted(found)}"
        for name, history in component.branches(context.history, names).items():
            self.close(found[name], self.velocities(component, history), f"branch {name!r}:")

    def needed_branches(self) -> tuple[str, ...]:
        names = self.branch_names()
        if not names:
            pytest.skip('it provides no "branch:NAME"')
        return names

    # --- gradients ----------------------------------------------------------------------------

    def test_image_gradient_reaches_the_image_expert(self, component: ImageFlowPolicy) -> None:
        """Finite, and not 0 everywhere."""
        v = self.replay(component, self.context(component)).velocities
        assert v is not None
        found = gradients(component, "image", v)
        assert any(gradient.any() for gradient in found), "no gradient reaches the image expert"
        assert all(torch.isfinite(gradient).all() for gradient in found), "not finite"

    def test_context_gradient_can_be_stopped(self, component: ImageFlowPolicy) -> None:
        """With ``context_gradient`` False no gradient of images reaches the text expert, and the
        velocities are the same."""
        context = self.context(component)
        with torch.no_grad():
            usual = self.replay(component, context).velocities
        v = self.replay(component, context, context_gradient=False).velocities
        assert v is not None
        assert usual is not None
        self.close(v.detach(), usual, "without context gradient:")
        if component.parameters().get("text"):
            found = gradients(component, "text", v)
            assert not any(g.any() for g in found), "image gradient reaches the text expert"
