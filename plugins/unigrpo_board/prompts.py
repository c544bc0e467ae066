"""The prompt source ``board``: scenes said in words, held-out compositions apart."""

from __future__ import annotations

from collections.abc import Callable

from unigrpo_board.scene import Scene, draw_scene, say
from unigrpo_core.interfaces import PromptSource
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Options, Provider
from unigrpo_core.records import Prompt

TRIES = 20  # draws per held-out prompt asked for, before no further text is expected


class BoardPrompts(PromptSource):
    """Prompts of the embedded world. A composition (count, kind, relation, other kind) is on one
    side of the split only, however it is worded, and no held-out one's mirror image is trained."""

    def train(self, seed: int, start: int, count: int) -> tuple[Prompt, ...]:
        return tuple(
            _prompt(f"train-{number}", Key((seed, "board", "train", number)), _trained)
            for number in range(start, start + count)
        )

    def held_out(self, count: int) -> tuple[Prompt, ...]:
        found: dict[str, Prompt] = {}
        for number in range(TRIES * count):
            if len(found) == count:
                break
            key = Key(("board", "held out", number))
            prompt = _prompt(f"held-out-{number}", key, _held_out)
            found.setdefault(prompt.text, prompt)
        return tuple(found.values())


def _trained(scene: Scene) -> bool:
    return scene.trained


def _held_out(scene: Scene) -> bool:
    return scene.held_out


def _prompt(name: str, key: Key, wanted: Callable[[Scene], bool]) -> Prompt:
    rng = key.generator()
    scene = draw_scene(rng, wanted)
    return Prompt(name, say(scene, rng), scene.metadata())


def build(options: Options) -> BoardPrompts:
    return BoardPrompts()


PROVIDER = Provider(
    name="board",
    build=build,
    summary="the embedded world: objects on a 3 x 3 board, in words that need reasoning",
)
