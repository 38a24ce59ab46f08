"""Ours against Hugging Face transformers and PEFT, as recorded by fixtures/make_golden.py."""
import os

import pytest
import torch
from safetensors.torch import load_file

import flora
from generate import generate
from model import GPT, Tokenizer

FIXTURES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures")
TINY = os.path.join(FIXTURES, "tiny")


@pytest.fixture(scope="module")
def golden():
    return load_file(os.path.join(FIXTURES, "golden.safetensors"))


@pytest.fixture
def tiny():
    return GPT.from_pretrained(TINY).requires_grad_(False)


def add_peft(model, kind, golden):
    """Add the adapter that `golden` holds under PEFT's keys; returns its id."""
    adapter_id = flora.add_adapter(model, kind, rank=2, alpha=8)
    prefix = f"{kind}:base_model.model."
    stored = {key.removeprefix(prefix): t for key, t in golden.items() if key.startswith(prefix)}
    for name, p in flora.adapter_parameters(model, adapter_id).items():
        layer, part = name.rsplit(".", 1)
        if kind == "lora":  # PEFT's lora_A [r, in] is our Bᵀ, its lora_B [out, r] our Aᵀ
            p.data.copy_(stored.pop(f"{layer}.lora_{'A' if part == 'B' else 'B'}.weight").T)
        else:
            p.data.copy_(stored.pop(f"{layer}.ia3_l").flatten())
    assert not stored  # PEFT adapts no projection that ours leaves out
    return adapter_id


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("flash", [True, False])
def test_logits_equal_hugging_face(tiny, golden, flash):
    tiny.set_attention(flash)
    assert_close(tiny(golden["ids"]), golden["logits"])


@pytest.mark.parametrize("flash", [True, False])
def test_greedy_of_a_ragged_batch_equals_hugging_face_one_by_one(tiny, golden, flash):
    tiny.set_attention(flash)
    prompts = [row[:n] for row, n in zip(golden["ids"].tolist(), golden["lengths"].tolist())]
    assert len(set(map(len, prompts))) == 3
    assert generate(tiny, prompts, max_new_tokens=12) == golden["greedy"].tolist()


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_adapter_equals_peft(tiny, golden, kind):
    ids, theirs = golden["ids"], golden[f"{kind}_logits"]
    shown = theirs.shape[1]
    assert (theirs - golden["logits"][:, -shown:]).abs().max() > 1  # the adapter is no identity
    adapter_id = add_peft(tiny, kind, golden)
    per_example = torch.full((len(ids),), adapter_id)
    for path in ("expand", "materialise"):
        for _, layer in flora.adapter_layers(tiny):
            layer.path = path
        assert_close(tiny(ids, per_example)[:, -shown:], theirs)
        assert_close(tiny(ids, per_example[:, None].expand_as(ids))[:, -shown:], theirs)
    flora.merge_adapter(tiny, adapter_id)
    assert_close(tiny(ids)[:, -shown:], theirs)


def test_mixed_batch_equals_hugging_face_and_peft_row_by_row(tiny, golden):
    lora, ia3 = add_peft(tiny, "lora", golden), add_peft(tiny, "ia3", golden)
    flora.freeze_bank(tiny)
    adapter_ids = torch.tensor([ia3, flora.BASE, lora] * 3)
    shown = golden["ia3_logits"].shape[1]
    ours = tiny(golden["ids"].repeat_interleave(3, 0), adapter_ids)[:, -shown:].unflatten(0, (3, 3))
    assert_close(ours[:, 0], golden["ia3_logits"])
    assert_close(ours[:, 1], golden["logits"][:, -shown:])
    assert_close(ours[:, 2], golden["lora_logits"])


def test_saved_folder_keeps_every_tensor_of_hugging_face(tiny, golden, tmp_path):
    tiny.save_pretrained(tmp_path)
    ours, theirs = (load_file(os.path.join(f, "model.safetensors")) for f in (tmp_path, TINY))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(GPT.from_pretrained(tmp_path)(golden["ids"]), tiny(golden["ids"]))


@pytest.mark.parametrize("text", [
    "def add(self, other):\n    return self.items[10] + other\n",
    "\tif x:\r\n\t\ty  =  2024   \n\n   \n", " leading", "trailing \t ", "",
    "s = 'Grüße, 世界 🎉 e\u0301 \u00a0'", "<fim_prefix>a<|endoftext|> b", "\x00\x7f\u2581",
])
def test_tokenizer_json_round_trip(text):
    tokenizer = Tokenizer(TINY)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < 300 for i in ids)


def test_tokenizer_json_special_tokens():
    tokenizer = Tokenizer(TINY)
    assert tokenizer.vocab_size == 300
    assert tokenizer.eos_id == 0
    assert tokenizer.fim_ids == [1, 3, 2]  # prefix, suffix, middle: the order of a FIM prompt
    one, zero = tokenizer.encode("10")  # every digit a token, as in StarCoder
    assert tokenizer.encode("<fim_prefix>1<fim_suffix>0<fim_middle>") == [1, one, 3, zero, 2]
    assert len(tokenizer.encode("    return")) == 2  # merges apply
