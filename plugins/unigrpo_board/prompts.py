"""The prompt source ``board``: scenes said in words, held-out compositions apart."""

from __future__ import annotations

from unigrpo_board.scene import Scene, draw_scene, say
from unigrpo_core.interfaces import PromptSource
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Options, Provider
from unigrpo_core.records import Prompt

TRIES = 20  # draws per held-out prompt asked for, before no further text is expected


class BoardPrompts(PromptSource):
    """Prompts of the embedded world; a composition (count, kind, relation, other kind) is on one
    side of the split only, however it is worded."""

    def train(self, seed: int, start: int, count: int) -> tuple[Prompt, ...]:
        return tuple(
            _prompt(f"train-{number}", Key((seed, "board", "train", number)), held_out=False)
            for number in range(start, start + count)
        )

    def held_out(self, count: int) -> tuple[Prompt, ...]:
        found: dict[str, Prompt] = {}
        for number in range(TRIES * count):
            if len(found) == count:
                break
            key = Key(("board", "held out", number))
            prompt = _prompt(f"held-out-{number}", key, held_out=True)
            found.setdefault(prompt.text, prompt)
        return tuple(found.values())


def _prompt(name: str, key: Key, *, held_out: bool) -> Prompt:
    rng = key.generator()
    scene: Scene = draw_scene(rng, held_out=held_out)
    return Prompt(name, say(scene, rng), scene.metadata())


def build(options: Options) -> BoardPrompts:
    return BoardPrompts()


PROVIDER = Provider(
    name="board",
    build=build,
    summary="the embedded world: objects on a 3 x 3 board, in words that need reasoning",
)
