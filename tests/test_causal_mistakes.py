"""What is wrong with a language model is told before the first rollout, in words."""

import json
import shutil

import pytest
import tiny_lm
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast
from unigrpo_models.adapters import Lora
from unigrpo_models.causal.options import CausalOptions
from unigrpo_models.causal.provider import build, notes
from unigrpo_models.causal.tokens import Style

from unigrpo_core.errors import UserError
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Placement
from unigrpo_core.records import Prompt, Sampling

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_lm.write(tmp_path_factory.mktemp("model") / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "model")


def told(match, folder, **arguments):
    with pytest.raises(UserError, match=match) as caught:
        tiny_lm.policy(folder, **arguments)
    assert str(folder) in str(caught.value) or "policy." in str(caught.value)


def test_a_tokenizer_without_a_chat_template(folder):
    (folder / "chat_template.jinja").unlink()
    told("has no chat template.*policy.chat = false", folder)
    tiny_lm.policy(folder, style=Style(chat=False))


def test_a_template_that_refuses(folder):
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}-"
    (folder / "chat_template.jinja").write_text(refusal)
    told("refuses a user's turn after policy.system_prompt.*no system", folder, style=Style("Be."))
    told("knows no such word", folder, style=Style(enable_thinking=True))
    tiny_lm.policy(folder)


def test_a_close_that_is_not_one_token(folder):
    told(
        "policy.close is '</thought>', which is 10 tokens", folder, style=Style(close="</thought>")
    )


def test_a_folder_without_a_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    told("has no tokenizer", folder)


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    told("no tokenizer that loads", folder)


def test_another_model_s_tokenizer(folder):
    words = PreTrainedTokenizerFast.from_pretrained(str(folder))
    words.add_tokens([f"word{number}" for number in range(9)])
    words.save_pretrained(str(folder))
    told(r"ids up to 26\d, but the model's head has 264 rows", folder)


def test_an_end_that_is_no_token(folder):
    tiny_lm.change(folder, "generation_config.json", eos_token_id=[257, 9999])
    told(r"names no token that ends a text \(eos_token_id.*got \[257, 9999\]", folder)


def test_missing_weights(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    told("has no weights.*pytorch_model.bin is a pickle, which is not read", folder)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "b", "c": "d"}}))
    told("lacks 2 of its 2 files of weights, the first b", folder)


def test_incomplete_weights(folder):
    state = load_file(folder / WEIGHTS)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    told(r"lack 1 tensors of Qwen2ForCausalLM, the first model.layers.1.mlp.up_proj", folder)


def test_damaged_and_misshapen_weights(folder):
    tiny_lm.change(folder, "config.json", intermediate_size=40)
    told("cannot be loaded", folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    told("cannot be loaded", folder)


def test_an_encoder(tmp_path):
    folder = tiny_lm.write(tmp_path / "bert", "bert")
    told(r"holds BertForMaskedLM, which is no causal language model \(BertLMHeadModel", folder)


def test_no_model_at_all(folder):
    tiny_lm.change(folder, "config.json", model_type="mine", auto_map={"AutoConfig": "mine.C"})
    told("not that of a model that this transformers knows", folder)
    (folder / "config.json").unlink()
    told("has no config.json", folder)


def test_quantized_weights(folder):
    tiny_lm.change(folder, "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    told("quantized", folder)


def test_adapters_that_bind_nothing(folder):
    lora = Lora(2, 4, {"text": ("q_proj", "query")})
    told("policy.lora_text names 'query'.*q_proj", folder, lora=lora)


def test_a_head_that_does_more(folder):
    network = tiny_lm.policy(folder).network
    network.check_head()
    network.scale = 1.1
    with pytest.raises(UserError, match="the head of Qwen2ForCausalLM is not a product"):
        network.check_head()


@pytest.mark.parametrize("word", ["compile", "cuda_graphs"])
def test_what_is_not_done_is_not_ignored(folder, word):
    with pytest.raises(UserError, match=f"compute.{word} is true.*set compute.{word} = false"):
        tiny_lm.policy(folder, **{word: True})


def test_a_prompt_that_is_too_long(folder):
    policy = tiny_lm.policy(folder)
    long, short = Prompt("long", "a" * 200), Prompt("short", "hello")
    with pytest.raises(UserError, match=r"'long' takes \d+ tokens.*ends at 128: 'aaaa"):
        policy.prompt_tokens(long)
    count = policy.prompt_tokens(short, 128 - policy.prompt_tokens(short))
    with pytest.raises(UserError, match=f"context of {count} tokens and a thought of 120 take"):
        policy.prompt_tokens(short, 120)
    with pytest.raises(UserError, match=r"lower text\.max_tokens"):
        policy.write(policy.open([short]), Sampling(120), [Key((0,))])


def test_a_control_token_in_a_prompt(folder):
    policy = tiny_lm.policy(folder)
    with pytest.raises(UserError, match=r"'p' has <\|end\|> in it, which would steer"):
        policy.prompt_tokens(Prompt("p", f"Hi{tiny_lm.END}"))


def test_weights_of_another_run(folder, tmp_path):
    adapted, lora = tmp_path / "adapted", Lora(2, 4, {"text": ("q_proj",)})
    tiny_lm.policy(folder, lora=lora).save(adapted)
    with pytest.raises(UserError, match="holds adapters, not whole weights"):
        tiny_lm.policy(folder).load(adapted)
    with pytest.raises(UserError, match="trained without adapters"):
        tiny_lm.policy(folder, lora=lora).load(folder)
    other = tiny_lm.write(tmp_path / "other", hidden_size=16)
    with pytest.raises(UserError, match="holds another model"):
        tiny_lm.policy(folder).load(other)


def test_check_says_what_is_missing(folder, tmp_path, monkeypatch):
    place = Placement(torch.device("cpu"), torch.float32, frozenset())
    assert notes(CausalOptions(checkpoint=str(folder))) == ()
    assert build(CausalOptions(checkpoint=str(folder)), place).prompt_tokens(Prompt("p", "hi"))
    (folder / "chat_template.jinja").unlink()
    (said,) = notes(CausalOptions(checkpoint=str(folder)))
    assert "no chat template" in said
    assert notes(CausalOptions(checkpoint=str(folder), chat=False)) == ()
    (folder / WEIGHTS).unlink()
    assert WEIGHTS in notes(CausalOptions(checkpoint=str(folder)))[0]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (said,) = notes(CausalOptions(checkpoint="Qwen/Qwen3-1.7B"))
    assert "hf download Qwen/Qwen3-1.7B" in said
