"""One adapter as a file: what is saved loads equal, what does not fit is refused."""
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import flora
from model import GPT
from plumbing.files import BadInput
from plumbing.flags import EMBEDDED
from test_flora import ALL, random_adapter, tiny_model


def test_saved_adapters_load_equal_and_carry_their_metadata(family, adapter, tmp_path):
    model, ids = tiny_model(family), torch.randint(0, 300, (2, 9))
    kind, rank, targets = adapter
    adapter_id = random_adapter(model, kind, rank, targets)
    flora.save_adapter(model, adapter_id, tmp_path / "a.safetensors", {"steps": 3})
    other = tiny_model(family)
    flora.add_adapter(other, "lora", 2)
    loaded = flora.load_adapter(other, tmp_path / "a.safetensors")
    assert loaded == 2 and os.listdir(tmp_path) == ["a.safetensors"]
    assert (other(ids, torch.tensor([2, 2])) - model(ids, torch.tensor([1, 1]))).abs().max() < 1e-5
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        metadata = json.loads(f.metadata()["flora_adapter"])
    assert metadata["kind"] == kind and metadata["base"] == model.fingerprint
    assert metadata["activation"] == ("identity" if kind == "ffba" else None)
    assert metadata["targets"] == list(
        ALL[family] if targets == ["all"] else targets or flora.default_targets(model, kind))
    assert metadata["training"] == {"steps": 3}


def test_adapters_keep_their_base_when_it_is_loaded_in_another_dtype(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    loads = [GPT.from_pretrained(tmp_path, dtype=dtype) for dtype in dtypes]
    assert {m.fingerprint for m in loads} == {tiny_model().fingerprint}


def test_adapter_files_that_do_not_fit_are_refused_in_a_sentence(tmp_path):
    model, good = tiny_model(), tmp_path / "good.safetensors"
    random_adapter(model, "flora", 2)
    flora.save_adapter(model, 1, good)
    tensors = load_file(good)
    name = "transformer.h.0.attn.c_attn.A"
    metadata = dict(kind="flora", rank=2, alpha=8.0, base=model.fingerprint, targets=["c_attn"],
                    training={})

    def refused(sentence, base=model, tensors=tensors, **changes):
        file = tmp_path / "bad.safetensors"
        save_file(tensors, file, {"flora_adapter": json.dumps(metadata | changes)})
        layers = [layer.num_adapters for _, layer in flora.adapter_layers(base)]
        with pytest.raises(BadInput, match=sentence):
            flora.load_adapter(base, file)
        assert layers == [layer.num_adapters for _, layer in flora.adapter_layers(base)]

    refused("was trained on another base model .fingerprint .*--weights", base=tiny_model(seed=1))
    refused("bad.safetensors: unknown adapter kind 'dora'", kind="dora")
    refused("bad.safetensors: unknown target 'q_proj'; use one of c_attn", targets=["q_proj"])
    refused("has shape .32, 2., this model needs .32, 3.", rank=3)
    refused(f"{name} is missing", tensors={k: v for k, v in tensors.items() if k != name})
    refused("tensor other is unexpected", tensors=tensors | {"other": torch.ones(1)})
    with pytest.raises(BadInput, match="nowhere.safetensors: no such adapter file"):
        flora.load_adapter(model, tmp_path / "nowhere.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-100])
    with pytest.raises(BadInput, match="cut.safetensors: not a readable safetensors file"):
        flora.load_adapter(model, tmp_path / "cut.safetensors")
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(BadInput, match='has no "flora_adapter" metadata'):
        flora.load_adapter(model, tmp_path / "plain.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_of_a_file_that_is_not_finite_refuses_it(kind, value, tmp_path):
    model, file = tiny_model(), tmp_path / "a.safetensors"
    flora.save_adapter(model, random_adapter(model, kind), file)
    tensors = load_file(file)
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    for name, tensor in tensors.items():
        damaged = tensor.clone()
        damaged.view(-1)[-1] = value
        save_file(tensors | {name: damaged}, file, metadata)
        with pytest.raises(BadInput, match=f"a.safetensors: {name} holds values that are not fin"):
            flora.load_adapter(tiny_model(), file)


def test_a_file_keeps_the_alpha_of_its_lora(tmp_path):
    """Another alpha is another adapter; one that is saved and loaded is the same."""
    model, ids = tiny_model(), torch.randint(0, 300, (1, 9))
    one = random_adapter(model, "lora", 2, alpha=3.0)
    flora.save_adapter(model, one, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        assert json.loads(f.metadata()["flora_adapter"])["alpha"] == 3.0
    again = flora.load_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(model(ids, torch.tensor([one])), model(ids, torch.tensor([again])))
    other = flora.add_adapter(model, "lora", 2, alpha=8.0)
    mine = flora.adapter_parameters(model, one)
    for name, p in flora.adapter_parameters(model, other).items():
        p.data.copy_(mine[name.replace(f".{other}.", f".{one}.")])
    difference = model(ids, torch.tensor([one])) - model(ids, torch.tensor([other]))
    assert difference.abs().max() > 1e-3


def test_a_base_that_differs_in_one_row_refuses_the_adapter_and_older_files_load(tmp_path):
    model, other, file = tiny_model(), tiny_model(), tmp_path / "a.safetensors"
    random_adapter(model, "flora")
    flora.save_adapter(model, 1, file)
    other.wte.weight.data[7] += 1
    with pytest.raises(BadInput, match="was trained on another base model"):
        flora.load_adapter(other, file)
    older = GPT.from_pretrained(EMBEDDED)   # the shipped files are from before
    assert flora.load_adapter(older, os.path.join(EMBEDDED, "adapters", "cpp.safetensors")) == 1
