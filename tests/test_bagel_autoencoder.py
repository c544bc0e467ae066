"""The autoencoder against the official one's outputs, and against diffusers'."""

from pathlib import Path

import pytest
import torch
from golden import DATA
from safetensors.torch import load_file, save_file
from unigrpo_models.bagel.autoencoder import Autoencoder, Sizes, read_autoencoder

from unigrpo_core.errors import UserError

CPU = torch.device("cpu")
RELEASED = Sizes(128, (128, 256, 512, 512), 2, 16)


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "golden.safetensors")


@pytest.fixture(scope="module")
def autoencoder():
    return read_autoencoder(DATA, 16, CPU)


def test_decoding(golden, autoencoder):
    for size in ("s0", "s1"):
        close(autoencoder.decode(golden[f"ae.{size}.latent"]), golden[f"ae.{size}.image"])


def test_encoding(golden, autoencoder):
    image = golden["ae.enc_image"]
    expected, logvar = golden["ae.enc_moments"].chunk(2, 1)
    mean, std = autoencoder.moments(image)
    close(mean, expected)
    close(std, (logvar / 2).exp())
    close(autoencoder.encode(image, torch.zeros_like(mean)), golden["ae.enc_mode_latent"])
    drawn = autoencoder.encode(golden["edit.vae_image"][None], golden["edit.vae_eps"])
    close(drawn, golden["edit.vae_latent"])


def test_images_are_decoded_a_few_at_a_time_alike(golden, autoencoder, monkeypatch):
    latents = torch.cat([golden["ae.s0.latent"], golden["ae.s0.latent"].flip(3)])
    together = autoencoder.decode(latents)
    monkeypatch.setattr("unigrpo_models.bagel.autoencoder.PIXELS", 64 * 64)
    torch.testing.assert_close(autoencoder.decode(latents), together, atol=1e-5, rtol=0)


def test_it_has_the_released_sizes_and_is_frozen(autoencoder):
    with torch.device("meta"):
        state = Autoencoder(RELEASED).state_dict()
    assert len(state) == 244
    assert sum(x.numel() for x in state.values()) == 83_819_683
    assert Sizes.of({name: tuple(x.shape) for name, x in state.items()}) == RELEASED
    assert not any(p.requires_grad for p in autoencoder.parameters())
    assert {p.dtype for p in autoencoder.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore")
def test_diffusers_computes_the_same():
    """At sizes that diffusers' class can have, with the names mapped."""
    from diffusers import AutoencoderKL

    sizes = Sizes(32, (32, 64, 64, 32), 2, 4)
    torch.manual_seed(0)
    ours = Autoencoder(sizes)
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=sizes.widths,
        layers_per_block=sizes.blocks,
        latent_channels=sizes.latent,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    expected = theirs.state_dict()
    for parameter in ours.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1)
    state = {diffusers_name(name): x for name, x in ours.state_dict().items()}
    theirs.load_state_dict({name: x.view(expected[name].shape) for name, x in state.items()})
    image, noise = torch.rand(1, 3, 16, 24) * 2 - 1, torch.randn(1, 4, 2, 3)
    with torch.no_grad():
        posterior = theirs.encode(image).latent_dist
        wanted = 0.3611 * (posterior.mean + posterior.std * noise - 0.1159)
        torch.testing.assert_close(ours.encode(image, noise), wanted, atol=1e-4, rtol=1e-4)
        wanted = theirs.decode(wanted / 0.3611 + 0.1159).sample
        again = ours.decode(ours.encode(image, noise))
        torch.testing.assert_close(again, wanted, atol=1e-4, rtol=1e-4)


def diffusers_name(name: str) -> str:
    side, _, rest = name.partition(".")
    parts = rest.split(".")
    if parts[0] in ("down", "up"):
        level = int(parts[1]) if side == "encoder" else 3 - int(parts[1])
        where = f"{side}.{parts[0]}_blocks.{level}"
        if parts[2] != "block":
            return f"{where}.{parts[2]}rs.0.conv.{parts[4]}"
        shortcut = parts[4].replace("nin_shortcut", "conv_shortcut")
        return f"{where}.resnets.{parts[3]}.{shortcut}.{parts[5]}"
    if parts[0] == "mid":
        if parts[1] != "attn_1":
            return f"{side}.mid_block.resnets.{int(parts[1][-1]) - 1}.{parts[2]}.{parts[3]}"
        inside = {"norm": "group_norm", "proj_out": "to_out.0"}.get(parts[2], f"to_{parts[2]}")
        return f"{side}.mid_block.attentions.0.{inside}.{parts[3]}"
    return f"{side}.{parts[0].replace('norm_out', 'conv_norm_out')}.{parts[1]}"


# --- files that are none ----------------------------------------------------------------------


def changed(folder: Path, change) -> Path:
    state = load_file(DATA / "ae.safetensors")
    change(state)
    save_file(state, folder / "ae.safetensors")
    return folder


def refused(folder: Path, message: str, channels: int = 16) -> None:
    with pytest.raises(UserError, match=message):
        read_autoencoder(folder, channels, CPU)


def test_a_missing_an_unexpected_and_a_misshapen_tensor_are_named(tmp_path):
    def change(state):
        del state["decoder.mid.attn_1.q.bias"]
        state["quant_conv.weight"] = torch.zeros(1)
        state["encoder.norm_out.weight"] = torch.zeros(64)

    changed(tmp_path, change)
    refused(tmp_path, r"missing decoder\.mid\.attn_1\.q\.bias \(32,\)")
    refused(tmp_path, r"unexpected quant_conv\.weight")
    refused(tmp_path, r"encoder\.norm_out\.weight is \(64,\), expected \(32,\)")


def test_a_file_of_something_else(tmp_path):
    refused(changed(tmp_path, lambda state: state.pop("encoder.conv_in.weight")), "encoder.conv_in")
    save_file({"weight": torch.zeros(3)}, tmp_path / "ae.safetensors")
    refused(tmp_path, "is no FLUX autoencoder: .*missing encoder.conv_in.weight")


def test_a_file_that_is_missing_or_cut_off(tmp_path):
    refused(tmp_path, "has no ae.safetensors, which decodes what this model draws")
    data = (DATA / "ae.safetensors").read_bytes()
    for size in (0, 4, 1000, len(data) - 10):
        (tmp_path / "ae.safetensors").write_bytes(data[:size])
        refused(tmp_path, "ae.safetensors is damaged")


def test_latents_that_the_model_does_not_take():
    refused(DATA, "latents of 16 channels, 8 times smaller .* takes 4 channels", channels=4)


def test_decoding_in_bfloat16_is_close(golden, autoencoder):
    """What its option offers; the images, within the range of pixels, differ by 1 % at most."""
    coarse = read_autoencoder(DATA, 16, CPU, torch.bfloat16)
    latents = golden["ae.s0.latent"]
    image, exact = coarse.decode(latents), autoencoder.decode(latents)
    assert image.dtype == torch.float32
    error = (image - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.02
