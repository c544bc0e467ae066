"""Colorfulness: how colorful an image looks, whatever it shows.

Paper
    D. Hasler, S. Suesstrunk: Measuring colourfulness in natural images, SPIE 5007 (2003), the
    metric M3.

Mathematics
    rg = R - G and yb = (R + G) / 2 - B at every pixel; with their variances and means over pixels
    M = sqrt(var rg + var yb) + .3 sqrt(mean(rg)^2 + mean(yb)^2).
    Over the cube of colors rg^2 + yb^2 <= 1.25, so M <= sqrt(1.25) sqrt(1 + .3^2), which an image
    of red and cyan reaches. The score is M over that bound: 0 for grey, at most 1.

Deviations and readings
    1. Pixels are in [0, 1], the paper's in [0, 255]. Its "extremely colorful", 109, is .366 here.
"""

from unigrpo_core.plugin import Provider, hookimpl

LARGEST = (1.25 * 1.09) ** 0.5


def colorfulness(batch):  # images: [B, 3, H, W] in [0, 1] -> float32 [B]
    red, green, blue = batch.images.flatten(2).unbind(1)
    rg, yb = red - green, (red + green) / 2 - blue
    spread = (rg.var(1, correction=0) + yb.var(1, correction=0)).sqrt()
    return (spread + 0.3 * (rg.mean(1) ** 2 + yb.mean(1) ** 2).sqrt()) / LARGEST


@hookimpl
def unigrpo_rewards():
    yield Provider(
        name="colorfulness",
        build=lambda options: colorfulness,
        reads=("image",),
        range=(0.0, 1.0),
        summary="how colorful the image looks, in [0, 1]",
    )
