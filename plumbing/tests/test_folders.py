"""Hugging Face folders, in and out."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import flora
from model import GPT
from plumbing.files import BadInput
from plumbing.flags import EMBEDDED
from plumbing.tests.test_tokenizer import copy_of_tiny
from plumbing.tokenizer import Tokenizer
from test_flora import FIXTURES, TINY, random_adapter, tiny_model


def test_folders_round_trip_whole_sharded_and_as_bin(family, tmp_path):
    model, ids = tiny_model(family), torch.randint(0, 300, (2, 9))
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names, wanted = sorted(tensors), model(ids)

    def loads():
        loaded = GPT.from_pretrained(tmp_path)
        return torch.equal(loaded(ids), wanted) and loaded.fingerprint == model.fingerprint

    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert loads()
    (tmp_path / "pytorch_model.bin").unlink()
    weight_map = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    head = {"lm_head.weight": "model-1.safetensors"}   # a tied one is in no shard
    index.write_text(json.dumps({"weight_map": head | weight_map}))
    assert loads()
    (tmp_path / "model-2.safetensors").unlink()
    sentence = "model-2.safetensors: this shard, named in .*index.json, is missing"
    with pytest.raises(BadInput, match=sentence):
        loads()


def test_saved_folder_keeps_every_tensor_of_hugging_face(tiny, golden, name, tmp_path):
    tiny.save_pretrained(tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    theirs = load_file(FIXTURES / f"tiny{name}" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(GPT.from_pretrained(tmp_path)(golden["ids"]), tiny(golden["ids"]))
    assert GPT.from_pretrained(tmp_path).config == tiny.config


class Called(TorchDispatchMode):
    """The names of all operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_model_that_is_loaded_is_filled_from_its_files_alone():
    """No weights are drawn first, which takes time."""
    with Called() as drawn:
        tiny_model()
    with Called() as loaded:
        GPT.from_pretrained(TINY)
    assert "normal_" in drawn.names and "normal_" not in loaded.names


def test_folders_that_do_not_fit_are_refused_naming_the_file_or_key(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")

    def refused(sentence, tensors=tensors, **changes):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(BadInput, match=sentence):
            GPT.from_pretrained(tmp_path)

    name = "transformer.h.1.mlp.c_fc.bias"
    refused("config.json: model_type is 'mistral', "
            "but only 'gpt_bigcode' or a family that extras/ holds", model_type="mistral")
    refused("config.json: multi_query is False, but only True", multi_query=False)
    refused("config.json: activation_function is 'relu'", activation_function="relu")
    refused("config.json: n_layer is 0, but must be a positive whole number", n_layer=0)
    refused("n_embd 32 is not a multiple of n_head 5", n_head=5)
    refused(f"tensor {name} is missing", tensors={k: v for k, v in tensors.items() if k != name})
    refused("unexpected tensor extra", tensors=tensors | {"extra": torch.ones(1)})
    refused(f"{name} has shape .3., but config.json needs .64.",
            tensors=tensors | {name: torch.ones(3)})
    (tmp_path / "config.json").write_text(json.dumps(config)[:-9])
    with pytest.raises(BadInput, match="config.json: not readable as JSON"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(BadInput, match="model.safetensors: truncated or not a weight file"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="holds neither model.safetensors nor pytorch_model.bin"):
        GPT.from_pretrained(tmp_path)
    pickled = tmp_path / "pytorch_model.bin"
    torch.save(tensors, pickled)
    pickled.write_bytes(pickled.read_bytes()[:-100])
    with pytest.raises(BadInput, match="pytorch_model.bin: truncated or not a weight file"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(BadInput, match="config.json: no such file"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(BadInput, match="nowhere: no such model folder"):
        GPT.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    with pytest.raises(BadInput, match="holds neither tokenizer.json nor tokenizer.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a tokenizer")
    with pytest.raises(BadInput, match="tokenizer.model: not a readable tokenizer"):
        Tokenizer(tmp_path)


def test_weights_that_are_not_what_config_json_says_are_never_dropped_or_half_read(tmp_path):
    """A tied embedding that differs, types and values that cannot be weights, sizes that the
    tensors do not have, pickles of something other than tensors."""
    tensors = load_file(TINY / "model.safetensors")
    config = json.loads((TINY / "config.json").read_text())
    embedding = tensors["transformer.wte.weight"]

    def load(tensors, name="model.safetensors", dtype=torch.float32, **changes):
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | changes))
        if name.endswith(".safetensors"):
            save_file(tensors, folder / name)
        else:
            torch.save(tensors, folder / name)
        return GPT.from_pretrained(folder, dtype=dtype)

    assert torch.equal(load(tensors | {"lm_head.weight": embedding.clone()}).wte.weight, embedding)
    sentence = "lm_head.weight differs from the embedding, to which config.json ties it"
    with pytest.raises(BadInput, match=sentence):
        load(tensors | {"lm_head.weight": embedding + 1})
    name = "transformer.h.0.attn.c_attn.weight"
    weight = tensors[name]
    for bad, dtype, sentence in [
            (weight.int(), torch.float32, "c_attn.weight holds int32; weights must be"),
            (weight.to(torch.float8_e4m3fn), torch.float32, "holds float8_e4m3fn; weights must be"),
            (weight * float("nan"), torch.float32, "holds values that are not finite in float32"),
            (weight * 1e6, torch.float16,
             "holds values that are not finite in float16; .* --dtype")]:
        with pytest.raises(BadInput, match=sentence):
            load(tensors | {name: bad}, dtype=dtype)
    load(tensors | {name: weight * 1e6})
    for key in ("n_layer", "n_positions", "vocab_size"):
        with pytest.raises(BadInput, match=f"{key} is 1000000000, but|needs .1000000000, 24."):
            load(tensors, **{key: 10**9})
    with pytest.raises(BadInput, match="pytorch_model.bin: .*holds more than tensors"):
        load({"model": TestCase()}, "pytorch_model.bin")
    with pytest.raises(BadInput, match="step is not a tensor"):
        load({"step": 3}, "pytorch_model.bin")


class TestCase:
    """Something that is not a tensor, for a pickle to hold."""
    __test__ = False


def test_a_tensor_in_two_shards_counts_where_the_index_says(tmp_path):
    folder = copy_of_tiny(tmp_path / "a")
    tensors, name = load_file(folder / "model.safetensors"), "transformer.ln_f.weight"
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model-1.safetensors")
    for shard, kept in (("model-1.safetensors", 1), ("model-2.safetensors", 2)):
        save_file({name: 2 * tensors[name]}, folder / "model-2.safetensors")
        weight_map = dict.fromkeys(tensors, "model-1.safetensors")
        weight_map |= {name: shard, "x": "model-2.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert torch.equal(GPT.from_pretrained(folder).ln_f.weight, kept * tensors[name])


def test_shards_may_lie_in_folders_inside_and_nowhere_else(tmp_path):
    folder, wanted = copy_of_tiny(tmp_path / "a"), GPT.from_pretrained(TINY)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "out.safetensors")
    (folder / "deep" / "er").mkdir(parents=True)
    files = [f"deep/{part}.safetensors" for part in ("1", "er/1", "er/../2")]
    weight_map = {name: files[i % 3] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file},
                  folder / file)

    def load(weight_map):
        index = dict(weight_map=weight_map)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return GPT.from_pretrained(folder)

    assert load(weight_map).fingerprint == wanted.fingerprint
    for outside in ("../out.safetensors", "deep/../../out.safetensors", "..",
                    str(tmp_path / "out.safetensors")):
        with pytest.raises(BadInput, match="index.json: names the shard .*, which is not in this"):
            load(dict.fromkeys(tensors, outside))
    for missing in ("out.safetensors", "deep/out.safetensors", "deep"):
        with pytest.raises(BadInput, match=f"{missing}: this shard, named in .*, is missing"):
            load(weight_map | {next(iter(tensors)): missing})


@pytest.mark.parametrize("name", [
    "model.safetensors", "pytorch_model.bin", "tokenizer.json", "config.json"])
def test_pointers_of_git_lfs_folders_and_pipes_are_named_as_such(name, tmp_path):
    folder = copy_of_tiny(tmp_path / "a")
    (folder / "model.safetensors").unlink() if name == "pytorch_model.bin" else None
    (folder / name).unlink(missing_ok=True)
    load = Tokenizer if name == "tokenizer.json" else GPT.from_pretrained
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (folder / name).write_text(pointer)
    with pytest.raises(BadInput, match=f"{name}: is a pointer of Git LFS, not the file itself"):
        load(folder)
    (folder / name).unlink()
    for put in (os.mkdir, os.mkfifo):
        put(folder / name)
        with pytest.raises(BadInput, match=f"{name}: is not a file but a folder, device or pipe"):
            load(folder)
        os.rmdir(folder / name) if put is os.mkdir else os.unlink(folder / name)


def test_a_merged_folder_keeps_what_goes_with_the_tokenizer_and_no_stranger(tmp_path):
    source = copy_of_tiny(tmp_path / "source", eos_token_id=[2, 5])
    for name, text in [
            ("generation_config.json", '{"eos_token_id": [2, 5, 9]}'),
            ("chat_template.jinja", "{{ x }}"),
            ("tokenizer_config.json", '{"model_max_length": 64}')]:
        (source / name).write_text(text)
    model, merged = GPT.from_pretrained(source), tmp_path / "merged"
    flora.merge_adapter(model, random_adapter(model, "flora"))
    merged.mkdir()
    shutil.copy(Path(EMBEDDED) / "tokenizer.model", merged)      # a stranger's
    (merged / "special_tokens_map.json").write_text("{}")
    for _ in range(2):
        model.save_pretrained(merged)
        Tokenizer(source).save(merged)
    assert sorted(os.listdir(merged)) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json"]
    assert json.loads((merged / "config.json").read_text())["eos_token_id"] == [2, 5]
    assert Tokenizer(merged).eos_ids == [2, 5, 9]
    Tokenizer(merged).save(merged)   # onto itself


def test_every_tensor_of_a_base_counts_in_its_fingerprint(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    tensors, known = load_file(tmp_path / "model.safetensors"), {model.fingerprint}
    for name, tensor in tensors.items():
        save_file(tensors | {name: tensor + 0.125}, tmp_path / "model.safetensors")
        known.add(GPT.from_pretrained(tmp_path).fingerprint)
        changed = tiny_model(family)
        changed.base_parameters()[name].data += 0.125
        assert changed.fingerprint in known   # of a model and of its folder, one fingerprint
    assert len(known) == 1 + len(tensors)


def test_the_norms_are_those_of_config_json(tmp_path):
    """Of a large epsilon, since a small one moves no logit."""
    folder = copy_of_tiny(tmp_path / "a", layer_norm_epsilon=0.5)
    model, seen = GPT.from_pretrained(folder), []

    def compare(norm, inputs, output):
        x, = inputs
        variance = x.var(-1, keepdim=True, unbiased=False)
        wanted = (x - x.mean(-1, keepdim=True)) / (variance + 0.5).sqrt()
        seen.append((wanted * norm.weight + norm.bias - output).abs().max().item())

    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(compare)
    logits = model(torch.arange(9)[None])
    assert len(seen) == 2 * model.config.n_layer + 1 and max(seen) < 1e-4
    assert (logits - GPT.from_pretrained(TINY)(torch.arange(9)[None])).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "b")
    shutil.copy(folder / "tokenizer.json", tmp_path / "b")
    assert torch.equal(GPT.from_pretrained(tmp_path / "b")(torch.arange(9)[None]), logits)


@pytest.mark.parametrize("name,activation", [
    ("gelu", lambda x: x / 2 * (1 + torch.erf(x / 2**0.5))),
    ("gelu_pytorch_tanh",
     lambda x: x / 2 * (1 + torch.tanh((2 / torch.pi)**0.5 * (x + 0.044715 * x**3))))])
def test_the_activation_is_that_of_config_json(name, activation, tmp_path):
    """The two differ by 5e-4 at most."""
    mlp = GPT.from_pretrained(copy_of_tiny(tmp_path / "a", activation_function=name)).blocks[0].mlp
    seen = []
    mlp.c_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mlp.c_fc.register_forward_hook(lambda _, inputs, output: seen.append(activation(output)))
    mlp(4 * torch.randn(9, 7, mlp.c_fc.in_features), None)
    ours, wanted = reversed(seen)
    assert (ours - wanted).abs().max() < 1e-5
