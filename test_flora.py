"""What this project promises, one strong test each. Run: pytest

Most tests use a tiny random model; those of the embedded model say so. Nothing here is timed.
"""
import copy
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import evaluate
import flora
import generate
import train
from flora import BASE, BadInput
from generate import Engine
from model import EMBEDDED, GPT, PRESETS, GPTConfig, Tokenizer, model_from_config, preset, run_main

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
TINY = FIXTURES / "tiny"   # a Hugging Face folder that fixtures/make_golden.py made
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU; the cpu case is the same check"))]
# By family: a config, adapters of every kind and some targets, and all targets. extras/tests adds families.
CONFIGS = {"gpt_bigcode": GPTConfig(vocab_size=300, n_positions=48, n_embd=32, n_layer=2, n_head=4, n_inner=64)}
MIXED = {"gpt_bigcode": [
    ("flora", 1, None), ("flora", 4, ["all"]), ("lora", 8, None), ("ia3", 1, None),
    ("flora", 2, ["c_attn.qk"]), ("ia3", 1, ["c_attn.k", "c_fc"]), ("lora", 2, ["c_attn.qk", "c_proj"])]}
ALL = {"gpt_bigcode": ["c_attn", "c_proj", "c_fc", "mlp.c_proj"]}
CONFIG = CONFIGS["gpt_bigcode"]


# What extras/tests runs again, for other families and kinds: a module that imports a test and defines
# one of these fixtures anew gets the test with its own values.


@pytest.fixture(scope="module")
def family():
    return "gpt_bigcode"


@pytest.fixture(params=list(flora.KINDS))
def kind(request):
    return request.param


@pytest.fixture
def mixed(family):
    """Adapters for one batch: (kind, rank, targets)."""
    return MIXED[family]


@pytest.fixture(params=range(len(MIXED["gpt_bigcode"])))
def adapter(family, request):
    """One after another of them."""
    return MIXED[family][request.param]


def random_model(config, seed=0):
    """Random and not near any symmetry: every weight, bias and LayerNorm gain matters."""
    torch.manual_seed(seed)
    model = model_from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def tiny_model(family="gpt_bigcode", seed=0):
    return random_model(CONFIGS[family], seed)


def random_adapter(model, kind, rank=1, targets=None, size=0.3, **options):
    """Add an adapter as training might have left it, far from the base model."""
    adapter_id = flora.add_adapter(model, kind, rank, targets, **options)
    with torch.no_grad():
        for p in flora.adapter_parameters(model, adapter_id).values():
            p.add_(size * torch.randn_like(p))
    return adapter_id


def layer_with(kind, rank, columns=None, d=24, k=36, **options):
    """One AdapterLinear shaped like c_attn (head dimension 6) with one random adapter, id 1."""
    torch.manual_seed(rank)
    layer = flora.AdapterLinear(d, k)
    layer.requires_grad_(False)
    adapter = flora.adapter_class(kind)(rank, "c_attn", d, k, columns, **options)
    layer.adapters["1"], layer.num_adapters = adapter, 1
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return layer, adapter


# ------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", ["expand", "materialise"])
@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_flora_equals_dense_W0_times_BA_over_r_forward_and_backward(rank, path, device):
    layer, adapter = layer_with("flora", rank)
    layer.to(device)
    x = torch.randn(3, 7, 24, device=device, requires_grad=True)
    leaves = [x, adapter.A, adapter.B]
    dense = x @ (layer.weight.T * (adapter.B @ adapter.A / rank)) + layer.bias
    y = layer(x, torch.ones(3, dtype=torch.int64, device=device), path=path)
    assert (y - dense).abs().max() < 1e-5
    for got, want in zip(torch.autograd.grad(y.sin().sum(), leaves),
                         torch.autograd.grad(dense.sin().sum(), leaves)):
        assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max())


@pytest.mark.parametrize("ids_shape", ["example", "token"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_lora_equals_dense_W0_plus_BA_scaled_forward_and_backward(rank, ids_shape):
    layer, adapter = layer_with("lora", rank)
    x = torch.randn(3, 7, 24, requires_grad=True)
    leaves = [x, adapter.A, adapter.B]
    dense = x @ (layer.weight.T + adapter.alpha / rank * adapter.B @ adapter.A) + layer.bias
    y = layer(x, torch.ones(3, 7, dtype=torch.int64)[:, 0 if ids_shape == "example" else slice(None)])
    assert (y - dense).abs().max() < 1e-5
    for got, want in zip(torch.autograd.grad(y.sin().sum(), leaves),
                         torch.autograd.grad(dense.sin().sum(), leaves)):
        assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max())


def test_ia3_scales_outputs_with_their_bias_or_the_inputs_of_mlp_c_proj():
    x, ids = torch.randn(3, 7, 24), torch.ones(3, dtype=torch.int64)
    layer, adapter = layer_with("ia3", 1)
    base = layer(x)
    assert torch.allclose(layer(x, ids), adapter.l * base, atol=1e-6)
    layer, adapter = layer_with("ia3", 1, (24, 30))  # columns [query 24 | key 6 | value 6]
    base = layer(x)
    expected = torch.cat([base[..., :24], adapter.l * base[..., 24:30], base[..., 30:]], dim=-1)
    assert torch.allclose(layer(x, ids), expected, atol=1e-6)
    layer, adapter = layer_with("ia3", 1, scales_input=True)
    assert torch.allclose(layer(x, ids), layer(x * adapter.l), atol=1e-6)


@pytest.mark.parametrize("kind", ["flora", "lora"])
def test_query_and_key_adapters_leave_the_value_columns_alone(kind):
    layer, adapter = layer_with(kind, 2, (0, 30))
    x = torch.randn(3, 7, 24)
    y, base = layer(x, torch.ones(3, dtype=torch.int64)), layer(x)
    assert torch.allclose(y[..., 30:], base[..., 30:], atol=1e-6)
    assert ((y - base)[..., :30].abs().amax(dim=(0, 1)) > 1e-3).all()


@pytest.mark.parametrize("path", ["expand", "materialise"])
def test_per_token_ids_give_each_chunk_its_own_adapter(path):
    model = tiny_model()
    for kind, rank, targets in MIXED["gpt_bigcode"]:
        random_adapter(model, kind, rank, targets)
    layer = model.transformer.h[0].attn.c_attn
    x = torch.randn(2, 9, 32)
    ids = torch.tensor([[1, 1, 1, 0, 0, 3, 3, 4, 5], [2, 2, 6, 6, 6, 7, 7, 0, 1]])
    y = layer(x, ids, path=path)
    for i in ids.unique():
        alone = layer(x, torch.full((2,), i), path=path)
        assert torch.allclose(y[ids == i], alone[ids == i], atol=1e-5)


@pytest.mark.parametrize("path", ["auto", "expand", "materialise"])
def test_a_batch_of_mixed_kinds_ranks_and_targets_equals_each_row_alone(path, family, mixed):
    """Alone: a model that holds only that one adapter, so neither padding nor numbering is shared."""
    model, alone = tiny_model(family), [tiny_model(family)]
    for kind, rank, targets in mixed:
        adapter_id = random_adapter(model, kind, rank, targets)
        alone.append(tiny_model(family))
        flora.add_adapter(alone[-1], kind, rank, targets)
        for mine, other in zip(flora.adapter_parameters(model, adapter_id).values(),
                               flora.adapter_parameters(alone[-1], 1).values()):
            other.data.copy_(mine)
    order = [3, 0, 1, 2, *range(len(mixed), 3, -1)]
    ids = torch.randint(0, 300, (len(order), 20))
    for _, layer in flora.adapter_layers(model):
        layer.path = path
    for frozen in (False, True):
        if frozen:
            flora.freeze_bank(model)
        logits = model(ids, torch.tensor(order))
        for row, adapter_id in enumerate(order):
            one = alone[adapter_id](ids[row:row + 1], torch.tensor([min(adapter_id, 1)]))
            assert (logits[row] - one[0]).abs().max() < 1e-4
            base = model(ids[row:row + 1])[0]
            assert adapter_id == 0 or (logits[row] - base).abs().max() > 1e-2   # it does something


@pytest.mark.parametrize("rank", [1, 2, 3, 7, 8])
def test_every_kind_and_rank_starts_as_the_base_model_bit_for_bit(kind, rank, family):
    model, ids = tiny_model(family), torch.randint(0, 300, (2, 9))
    flora.add_adapter(model, kind, rank, ["all"])
    for path in ("expand", "materialise"):
        for _, layer in flora.adapter_layers(model):
            layer.path = path
        assert torch.equal(model(ids, torch.tensor([1, 1])), model(ids))


def test_rank_components_train_apart():
    """All ones would be the identity too, but would train at every rank as rank 1."""
    torch.manual_seed(0)
    target = torch.randn(24, 4) @ torch.randn(4, 36)          # a ΔW of rank 4 to be learnt
    layer, x = flora.AdapterLinear(24, 36), torch.randn(64, 1, 24)
    layer.adapters["1"], layer.num_adapters = flora.FLoRA(4, "c_attn", 24, 36), 1
    wanted = (x @ (layer.weight.T * target) + layer.bias).detach()
    optimizer = torch.optim.Adam(layer.adapters.parameters(), lr=0.05)
    for _ in range(300):
        loss = F.mse_loss(layer(x, torch.ones(64, dtype=torch.int64)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    A, B = layer.adapters["1"].A, layer.adapters["1"].B
    assert torch.linalg.svdvals(B @ A / 4)[3] > 0.1 * torch.linalg.svdvals(B @ A / 4)[0]
    assert loss < 0.05 * wanted.var()


def test_flora_path_is_chosen_from_rank_and_tokens_per_adapter():
    def choice(b, T, rank, ids):
        return flora.choose_path(torch.empty(b, T, 8), rank, torch.tensor(ids))
    assert choice(8, 512, 1, [1] * 8) == "expand"                       # rank 1: Eq. 6 is one matmul
    assert choice(64, 1, 16, [1] * 64) == "expand"                      # decode
    assert choice(4, 256, 16, [1, 2, 3, 4]) == "materialise"            # a prompt
    assert choice(4, 4, 8, [1, 2, 3, 4]) == "expand"                    # four short prompts ...
    assert choice(4, 4, 16, [1, 1, 1, 1]) == "materialise"              # ... and with one adapter
    layer, _ = layer_with("flora", 4)
    with pytest.raises(BadInput, match='path is .fast.; use "auto", "expand" or "materialise"'):
        layer(torch.randn(1, 2, 24), torch.tensor([1]), path="fast")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["expand", "materialise"])
def test_half_precision_base_costs_an_adapter_no_more_than_it_costs_the_base(dtype, path):
    """Against float64: an adapter near the identity loses little more to rounding than W0 x does.
    An adapter itself rounded to half precision, 1 + a with small a, would lose most of a."""
    torch.manual_seed(0)
    layer, adapter = layer_with("flora", 4, d=128, k=160)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(p.round() + 1e-3 * torch.randn_like(p))
    x = torch.randn(4, 64, 128).to(dtype)
    layer.weight.data = layer.weight.to(dtype)
    layer.bias.data = layer.bias.to(dtype)
    W0, bias = layer.weight.T.double(), layer.bias.double()
    ids = torch.ones(4, dtype=torch.int64)
    exact = x.double() @ (W0 * (adapter.B.double() @ adapter.A.double() / 4)) + bias
    base_error = (layer(x).double() - (x.double() @ W0 + bias)).pow(2).mean().sqrt()
    error = (layer(x, ids, path=path).double() - exact).pow(2).mean().sqrt()
    assert adapter.A.dtype == torch.float32 and error < 3 * base_error


def test_ids_that_no_adapter_has_are_refused():
    model = tiny_model()
    random_adapter(model, "flora")
    for bad in (2, -1):
        with pytest.raises(IndexError):
            model(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([bad]))


def test_only_the_adapter_gets_gradients(family):
    model = tiny_model(family)
    model.requires_grad_(False)
    adapter_id = flora.add_adapter(model, "flora", 2, ["all"])
    model(torch.randint(0, 300, (2, 9)), torch.tensor([1, 1])).sin().sum().backward()
    trained = flora.adapter_parameters(model, adapter_id)
    assert len(trained) == 2 * len(ALL[family]) * CONFIG.n_layer
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name in {n.replace(".A", ".adapters.1.A").replace(
            ".B", ".adapters.1.B") for n in trained})


def test_merging_gives_the_adapted_model(family, adapter):
    model, ids = tiny_model(family), torch.randint(0, 300, (2, 9))
    adapter_id, before = random_adapter(model, *adapter), model.fingerprint
    wanted = model(ids, torch.tensor([adapter_id] * 2))
    flora.merge_adapter(model, adapter_id)
    assert (model(ids) - wanted).abs().max() < 1e-4
    assert model.fingerprint != before
    with pytest.raises(BadInput, match="no adapter 1"):
        flora.adapter_parameters(model, 1)


@pytest.mark.parametrize("path", ["per_row", "per_token"])
@pytest.mark.parametrize("T", [1, 7])
def test_lora_paths_equal_the_dense_definition(path, T):
    """y_i = x_i (W0 + (alpha / r) B_i A_i), mixed ranks, the base among them, with and without gather."""
    torch.manual_seed(0)
    layer = flora.AdapterLinear(16, 24)
    layer.num_adapters, layer.lora = 3, getattr(flora, f"lora_{path}")
    for i, rank in [(1, 1), (3, 4)]:
        layer.adapters[str(i)] = flora.LoRA(rank, "c_fc", 16, 24)
        torch.nn.init.normal_(layer.adapters[str(i)].A)
    assert_lora_equals_its_definition(layer, T)


def assert_lora_equals_its_definition(layer, T):
    x, ids = torch.randn(5, T, 16), torch.tensor([3, 0, 1, 2, 3])
    with torch.no_grad():
        W = [layer.weight.T] * 4
        for i, a in layer.adapters.items():
            W[int(i)] = layer.weight.T + 8 / a.rank * a.B @ a.A
        dense = torch.stack([x[row] @ W[i] for row, i in enumerate(ids.tolist())]) + layer.bias
        torch.testing.assert_close(layer(x, ids), dense)
        torch.testing.assert_close(layer(x, ids[:, None].expand(5, T)), dense)
        torch.testing.assert_close(layer(x, flora.Gathered({layer: layer.rows(ids)})), dense)


def test_the_inflection_rank_is_where_eq_7_holds_with_equality():
    """c1 (d + k) / (c2 d k) + 1/r = 1; the paper's own form, 2 c1 / (d c2) + 1/r = 1, where d = k."""
    for c1, c2, d, k in [(3e-9, 4e-11, 256, 320), (1e-9, 4e-11, 1024, 1024)]:
        rank = flora.inflection_rank(c1, c2, d, k)
        assert c1 * (d + k) / (c2 * d * k) + 1 / rank == pytest.approx(1)
    assert 2 * c1 / (d * c2) + 1 / rank == pytest.approx(1)
    assert flora.inflection_rank(1e-6, 1e-11, 256, 256) == float("inf")
    assert flora.free_rank(32, 295) == pytest.approx(9.2, abs=0.05)   # batch 32 on an H100


# ---------------------------------------------------------------------------------- adapter files


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
    from safetensors import safe_open
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        metadata = json.loads(f.metadata()["flora_adapter"])
    assert metadata["kind"] == kind and metadata["base"] == model.fingerprint
    assert metadata["activation"] == ("identity" if kind == "ffba" else None)
    assert metadata["targets"] == list(
        ALL[family] if targets == ["all"] else targets or flora.default_targets(model, kind))
    assert metadata["training"] == {"steps": 3}


def test_adapters_keep_their_base_when_it_is_loaded_in_another_dtype(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loads = [GPT.from_pretrained(tmp_path, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float16)]
    assert {m.fingerprint for m in loads} == {tiny_model().fingerprint}


def test_adapter_files_that_do_not_fit_are_refused_in_a_sentence(tmp_path):
    model, good = tiny_model(), tmp_path / "good.safetensors"
    random_adapter(model, "flora", 2)
    flora.save_adapter(model, 1, good)
    tensors = load_file(good)
    name = "transformer.h.0.attn.c_attn.A"
    metadata = dict(kind="flora", rank=2, alpha=8.0, base=model.fingerprint, targets=["c_attn"], training={})

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


@pytest.mark.parametrize("kind,rank,targets,sentence", [
    ("dora", 1, None, "unknown adapter kind 'dora'; use one of flora, lora, ia3, or a kind that extras/ holds"),
    ("lora", 1, ["attn"], "unknown target 'attn'; use one of c_attn"),
    ("flora", 0, None, "rank is 0; use a whole number of at least 1"),
    ("lora", 1.5, None, "rank is 1.5; use a whole number"),
    ("flora", 1, ["wq"], "unknown target 'wq'; use one of c_attn, c_attn.qk.*or all"),
    ("flora", 1, ["q_proj"], "unknown target 'q_proj'; use one of c_attn, c_attn.qk, .*mlp.c_proj, or all"),
    ("flora", 1, ["c_attn", "c_attn.qk"], "adapt transformer.h.0.attn.c_attn twice"),
])
def test_adapters_that_cannot_be_are_refused_in_a_sentence(kind, rank, targets, sentence):
    with pytest.raises(BadInput, match=sentence):
        flora.add_adapter(tiny_model(), kind, rank, targets)


# -------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flash", [True, False])
def test_cached_generation_equals_uncached_token_for_token_on_ragged_prompts(flash, device, family):
    """Uncached: each prompt alone, the whole sequence again for every token."""
    model = tiny_model(family).to(device)
    model.set_attention(flash)
    random_adapter(model, "flora", 2, ["all"])
    prompts = [[5], [7, 8, 9, 10, 11, 12, 13, 14], [1, 2, 3], []]
    adapter_ids = [1, 0, 1, 0]
    new = generate.generate(model, prompts, adapter_ids, max_new_tokens=24)
    for prompt, adapter_id, got in zip(prompts, adapter_ids, new):
        ids, want = prompt or [0], []
        for _ in range(24):
            logits = model(torch.tensor([ids + want], device=device), torch.tensor([adapter_id], device=device))
            want.append(int(logits[0, -1].argmax()))
        assert got == want
    assert len({tuple(n) for n in new}) == 4


def test_plain_math_attention_equals_scaled_dot_product_attention(family):
    model, ids = tiny_model(family), torch.randint(0, 300, (2, 20))
    fast = model(ids)
    model.set_attention(False)
    assert (model(ids) - fast).abs().max() < 1e-4


def test_gradient_checkpointing_changes_no_gradient(family):
    model, ids = tiny_model(family), torch.randint(0, 300, (2, 20))
    model.requires_grad_(False)
    random_adapter(model, "flora", 2)
    grads = []
    for model.gradient_checkpointing in (False, True):
        loss = model(ids, torch.tensor([1, 1])).sin().sum()
        grads.append(torch.autograd.grad(loss, list(flora.adapter_parameters(model, 1).values())))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))


def test_presets_have_the_published_sizes():
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in GPT(config).parameters()) for name, config in PRESETS.items()}
    assert {name: round(size / 1e6) for name, size in sizes.items()} == {
        "tiny_starcoder_py": 164, "starcoderbase-1b": 1137, "starcoderbase-3b": 3043,
        "starcoderbase-7b": 7327, "starcoder": 15517, "starcoder-cpu": 27}
    with pytest.raises(BadInput, match="--model starcoder-9b: unknown; use one of tiny_starcoder_py, starcoderbase-1b"):
        preset("starcoder-9b")


# ------------------------------------------------------ golden values: Hugging Face transformers 5.24


@pytest.fixture
def name():
    """Of a folder fixtures/tiny{name} and its golden values."""
    return ""


@pytest.fixture
def golden(name):
    return load_file(FIXTURES / f"golden{name}.safetensors")


@pytest.fixture
def tiny(name):
    return GPT.from_pretrained(FIXTURES / f"tiny{name}").requires_grad_(False)


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
    assert generate.generate(tiny, prompts, max_new_tokens=12) == golden["greedy"].tolist()


def test_saved_folder_keeps_every_tensor_of_hugging_face(tiny, golden, name, tmp_path):
    tiny.save_pretrained(tmp_path)
    ours, theirs = (load_file(Path(f) / "model.safetensors") for f in (tmp_path, FIXTURES / f"tiny{name}"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(GPT.from_pretrained(tmp_path)(golden["ids"]), tiny(golden["ids"]))
    assert GPT.from_pretrained(tmp_path).config == tiny.config


# ---------------------------------------------------------------------------- folders of weights


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
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-1.safetensors"} | weight_map}))
    assert loads()
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(BadInput, match="model-2.safetensors: this shard, named in .*index.json, is missing"):
        loads()


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
    refused("config.json: model_type is 'mistral', but only 'gpt_bigcode' or a family that extras/ holds", model_type="mistral")
    refused("config.json: multi_query is False, but only True", multi_query=False)
    refused("config.json: activation_function is 'relu'", activation_function="relu")
    refused("config.json: n_layer is 0, but must be a positive whole number", n_layer=0)
    refused("n_embd 32 is not a multiple of n_head 5", n_head=5)
    refused(f"tensor {name} is missing", tensors={k: v for k, v in tensors.items() if k != name})
    refused("unexpected tensor extra", tensors=tensors | {"extra": torch.ones(1)})
    refused(f"{name} has shape .3., but config.json needs .64.", tensors=tensors | {name: torch.ones(3)})
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
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").write_bytes((tmp_path / "pytorch_model.bin").read_bytes()[:-100])
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


CODE = "def f(x):\n\t  return x  # é ▁▁ 漢字 🙂\r\n\n    if x == 10:\n        pass\x00 \n   \n<|endoftext|>\n"


def test_embedded_tokenizer_round_trips_code_exactly():
    tokenizer = Tokenizer(EMBEDDED)
    for text in [CODE, "", " ", "\n", Path(train.__file__).read_text(encoding="utf-8")]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_id == 0 and 0 not in tokenizer.encode(CODE)


@pytest.fixture(params=[TINY, Path(EMBEDDED)], ids=["tokenizer.json", "tokenizer.model"])
def tokenizer_folder(request):
    return request.param


@pytest.mark.parametrize("text", [
    "def add(self, other):\n    return self.items[10] + other\n",
    "\tif x:\r\n\t\ty  =  2024   \n\n   \n", " leading", "  two", "trailing \t ", "", " ",
    "s = 'Grüße, 世界 🎉 e\u0301 \u00a0'", "<fim_prefix>a<|endoftext|> b", "\x00\x7f\u2581",
    "\u2581 a\u2581\u2581b",
])
def test_tokenizers_round_trip_a_text_whole_and_as_what_follows_another(tokenizer_folder, text):
    tokenizer = Tokenizer(tokenizer_folder)
    if tokenizer_folder.name == "tiny_llama":   # whose tokenizer.json takes a ▁ for a space
        text = text.replace("\u2581", "")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    whole = tokenizer.encode("x = 1" + text)
    for n in range(1, len(whole)):  # what a prompt and its continuation are, wherever one ends
        start, rest = tokenizer.decode(whole[:n]), tokenizer.decode(whole[n:], continues=True)
        assert "\ufffd" in start + rest or start + rest == "x = 1" + text


def test_tokenizer_json_special_tokens():
    tokenizer = Tokenizer(TINY)
    assert tokenizer.vocab_size == 300
    assert tokenizer.eos_id == 0
    assert tokenizer.fim_ids == [1, 3, 2]  # prefix, suffix, middle: the order of a FIM prompt
    one, zero = tokenizer.encode("10")  # every digit a token, as in StarCoder
    assert tokenizer.encode("<fim_prefix>1<fim_suffix>0<fim_middle>") == [1, one, 3, zero, 2]
    assert len(tokenizer.encode("    return")) == 2  # merges apply


# --------------------------------------------------------------------------------------- training


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny random model with the embedded tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny")
    config = GPTConfig(vocab_size=4096, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=64)
    random_model(config).save_pretrained(folder)
    Tokenizer(EMBEDDED).save(folder)
    return folder


HEADERS = str(Path(torch.__file__).parent / "include" / "c10" / "util" / "*.h")


def tiny_flags(tiny_folder, out, *flags):
    return [str(f) for f in ("--weights", tiny_folder, "--data", HEADERS, "--steps", 40, "--block-size", 32,
                             "--eval-every", 10, "--eval-tokens", 500, "--out", out, *flags)]


def run_train(*args):
    return train.train(train.parse_args(tiny_flags(*args)))


def losses(report):
    return [(p["step"], p["loss"], p["heldout_loss"]) for p in report["log"]]


def check_training(folder, out, *flags):
    """Train twice with one seed; returns the report."""
    one, two = (run_train(folder, out / name, *flags) for name in "ab")
    assert losses(one) == losses(two)
    assert one["heldout_loss_after"] < one["heldout_loss_before"] - 0.01
    bits = one["heldout_loss_after"] * one["heldout_tokens"] / np.log(2)
    assert one["heldout_bpb_after"] == pytest.approx(bits / one["heldout_bytes"])
    assert {"adapter", "rank", "targets", "steps", "heldout_bpb_before", "trainable_parameters",
            "total_parameters", "tokens_per_second", "seconds", "adapter_file"} <= one.keys()
    return one


def test_training_lowers_heldout_loss_and_a_seed_gives_the_same_losses_twice(
        kind, tiny_folder, tmp_path):
    flags = ["--adapter", kind, "--targets", "all", "--lr", 0.02]
    report = check_training(tiny_folder, tmp_path, *flags)
    model = GPT.from_pretrained(tiny_folder)
    saved = flora.adapter_parameters(model, flora.load_adapter(model, report["adapter_file"]))
    assert sum(p.numel() for p in saved.values()) == report["trainable_parameters"]


def start_train(*args, launcher=()):
    return subprocess.Popen([sys.executable, *launcher, str(HERE / "train.py"), *tiny_flags(*args)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(params=[(signal.SIGKILL, "flora"), (signal.SIGINT, "lora")], ids=["kill", "interrupt"])
def ending(request):
    """How a training ends too early, and the kind of its adapter."""
    return request.param


def test_a_killed_or_interrupted_run_resumes_with_the_losses_of_an_uninterrupted_one(
        ending, tiny_folder, tmp_path):
    how, kind = ending
    flags = ["--steps", 150, "--rank", 2, "--adapter", kind]
    process = start_train(tiny_folder, tmp_path / "cut", *flags)
    while not (tmp_path / "cut" / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(how)
    printed = process.communicate()[0]
    step = train.load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["step"]
    assert 10 <= step < 150 and "Traceback" not in printed
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    if how == signal.SIGINT:
        assert f"interrupted at step {step}; go on with:" in printed and "--resume" in printed
    with pytest.raises(BadInput, match=f"is an unfinished run at step {step}; add --resume"):
        run_train(tiny_folder, tmp_path / "cut", *flags)
    with pytest.raises(BadInput, match="was made with --seed 0, not 5; give the same flags"):
        run_train(tiny_folder, tmp_path / "cut", *flags, "--resume", "--seed", 5)
    resumed = run_train(tiny_folder, tmp_path / "cut", *flags, "--resume")
    whole = run_train(tiny_folder, tmp_path / "whole", *flags)
    after_cut = {p["step"]: p["heldout_loss"] for p in resumed["log"]}
    assert {p["step"]: after_cut[p["step"]] for p in whole["log"]} == pytest.approx(
        {p["step"]: p["heldout_loss"] for p in whole["log"]}, abs=1e-6)


def test_two_processes_give_the_losses_of_one(tiny_folder, tmp_path):
    check_two_processes("flora", tiny_folder, tmp_path)


def check_two_processes(kind, folder, out):
    flags = ["--adapter", kind, "--grad-accum", 2, "--steps", 20]
    process = start_train(folder, out / "two", *flags, launcher=(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"))
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    two = json.loads((out / "two" / "log.json").read_text())
    one = run_train(folder, out / "one", *flags)
    for a, b in zip(two["log"], one["log"], strict=True):
        assert a["heldout_loss"] == pytest.approx(b["heldout_loss"], abs=1e-4)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
        tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "learning_rate", lambda step, args: 1e-3 if step < 20 else 1e30)
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny_flags(tiny_folder, tmp_path)])
    with pytest.raises(SystemExit) as exit:
        run_main(train.main)
    assert exit.value.code == 1
    assert re.search(r"loss is (nan|inf) at step 2[12]; the last good checkpoint is kept in .*checkpoint.pt; "
                     "lower --lr", capsys.readouterr().err)
    checkpoint = train.load_checkpoint(tmp_path / "checkpoint.pt")
    assert checkpoint["step"] == 20 and all(t.isfinite().all() for t in checkpoint["trained"].values())


def test_data_is_deduplicated_and_whole_files_are_held_out(tmp_path):
    folder = tmp_path / "code"
    (folder / ".git").mkdir(parents=True)
    body = "int {0}_add(int a) {{\n  return a + 1;\n}}\nint {0}_sub(int a) {{\n  return a - 2;\n}}\n"
    for name in ("one", "two", "three"):                        # generated: a name differs
        (folder / f"{name}.h").write_text(body.format(name))
    for i in range(40):
        (folder / f"f{i}.h").write_text("".join(f"word{i} " * (1 + (i * j) % 7) + ";\n" for j in range(12)))
    (folder / "binary.h").write_bytes(b"\x00\x01\xff")
    (folder / "latin1.h").write_bytes("é".encode("latin-1"))
    (folder / "empty.h").write_text("")
    (folder / "notes.txt").write_text("not code")
    (folder / ".git" / "hidden.h").write_text("hidden")
    files = train.find_files([str(folder)], [".h"])
    assert len(files) == 46 and files == train.find_files([str(folder / "*.h")]) and files == sorted(files)
    texts, skipped = train.read_texts(files)
    assert (len(texts), skipped) == (43, 3)
    distinct = train.drop_near_duplicates(texts)
    assert sum("_add" in text for text in distinct) == 1
    training, held = train.split(distinct)
    assert not set(training) & set(held) and sorted(training + held) == sorted(distinct) and held
    tokenizer = Tokenizer(EMBEDDED)
    x, y, size = train.heldout_blocks(held, tokenizer, 16, 10**9)
    assert size == sum(len(t.encode()) for t in held)
    assert int((y != -100).sum()) == sum(len(tokenizer.encode(t)) for t in held)


# ------------------------------------------------------------------------------------- generation


def run_script(main, argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
    run_main(main)


@pytest.fixture(scope="session")
def embedded_adapters(tmp_path_factory):
    """Adapters of the embedded base model, far from it: {name: file}, and none."""
    return save_embedded_adapters(tmp_path_factory.mktemp("adapters"), [
        ("flora1", "flora", 1, 0.4), ("flora4", "flora", 4, 0.4), ("lora8", "lora", 8, 0.1),
        ("ia3", "ia3", 1, 0.5), ("other", "flora", 1, 0.5)])


def save_embedded_adapters(folder, adapters):
    """Save (name, kind, rank, distance from the base) adapters of the embedded model -> {name: file}."""
    model, files = GPT.from_pretrained(EMBEDDED), {"none": "none"}
    torch.manual_seed(0)
    for name, kind, rank, size in adapters:
        files[name] = str(folder / f"{name}.safetensors")
        flora.save_adapter(model, random_adapter(model, kind, rank, size=size), files[name])
    return files


def check_prompts_in_one_batch(adapters, folder, monkeypatch):
    """The command on the embedded model, one prompt per adapter file: together as each alone."""
    prompts = ["def fibonacci(n):", "import os\n\nclass A(object):\n    def", "#include",
               "for i in", "x = [", "    return"]
    pairs = list(zip(prompts, adapters))

    def tokens(pairs):
        argv = ["generate.py", "--max-new-tokens", 24, "--json", folder / "out.json"]
        for prompt, adapter in pairs:
            argv += ["--prompt", prompt, "--adapter", adapter]
        run_script(generate.main, argv, monkeypatch)
        return [row["tokens"] for row in json.loads((folder / "out.json").read_text())]

    together = tokens(pairs)
    assert together == [tokens([pair])[0] for pair in pairs]
    base = tokens([(prompt, "none") for prompt, _ in pairs])
    for own, base_tokens, adapter in zip(together, base, adapters):
        assert (own != base_tokens) == (adapter != "none")


@pytest.mark.parametrize("names", [
    ["flora1", "other"], ["flora1", "flora4", "lora8", "ia3", "none", "other"]])
def test_prompts_with_their_own_adapters_in_one_batch_give_the_tokens_of_each_alone(
        names, embedded_adapters, tmp_path, monkeypatch):
    """Six rows mix FLoRA ranks 1 and 4, LoRA, IA3, none."""
    files = [embedded_adapters[name] for name in names]
    check_prompts_in_one_batch(files, tmp_path, monkeypatch)


def test_generate_reads_files_and_standard_input_and_stops_where_told(tiny_folder, tmp_path, monkeypatch, capsys):
    import io
    (tmp_path / "p.txt").write_text("def f")
    monkeypatch.setattr(sys, "stdin", io.StringIO("class A"))
    common = ["generate.py", "--weights", tiny_folder, "--json", tmp_path / "o.json", "--max-new-tokens", 12]
    run_script(generate.main, [*common, "--prompt-file", tmp_path / "p.txt", "--prompt-file", "-"], monkeypatch)
    rows = json.loads((tmp_path / "o.json").read_text())
    printed = capsys.readouterr()
    assert [row["prompt"] for row in rows] == ["def f", "class A"]
    assert [len(row["tokens"]) for row in rows] == [12, 12]
    shown = {i: "\n".join(re.findall(rf"^\[{i}\] (.*)$", printed.out, re.M)) for i in (1, 2)}
    assert shown[1].strip() == ("def f" + rows[0]["text"]).strip()
    assert re.search(r"24 tokens in .* s: .* tokens/s, batch 2", printed.err)
    stop = rows[0]["text"][8:12]
    run_script(generate.main, [*common, "--prompt", "def f", "--stop", stop], monkeypatch)
    row = json.loads((tmp_path / "o.json").read_text())[0]
    assert row["text"] == rows[0]["text"][:rows[0]["text"].index(stop)]
    assert row["tokens"] == rows[0]["tokens"][:len(row["tokens"])] and len(row["tokens"]) < 12
    assert capsys.readouterr().out == "def f" + row["text"] + "\n"


def test_generation_ends_after_end_of_text_and_at_the_end_of_the_context():
    model = tiny_model()
    free = generate.generate(model, [[5, 6], [9] * 40], max_new_tokens=100)
    assert [len(row) for row in free] == [46, 8]
    eos = free[0][4]
    ended = generate.generate(model, [[5, 6], [9] * 40], max_new_tokens=100, eos_id=eos)
    assert ended[0] == free[0][:free[0].index(eos) + 1]
    with pytest.raises(BadInput, match="a prompt has 49 tokens, more than the model's context of 48"):
        generate.generate(model, [[1] * 49])


def test_sampling_follows_the_distribution_and_no_row_depends_on_its_neighbours():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0))

    def shares(temperature=1.0, top_k=0, top_p=1.0):
        n = len(u)
        picked = generate.sample(logits.expand(n, -1), torch.full((n,), temperature), torch.full((n,), top_k),
                                 torch.full((n,), top_p), u)
        return torch.bincount(picked, minlength=4) / n

    probs = logits[0].softmax(-1)
    assert torch.allclose(shares(), probs, atol=0.01)
    assert torch.allclose(shares(temperature=0.5), (2 * logits[0]).softmax(-1), atol=0.01)
    assert torch.allclose(shares(top_k=2), torch.tensor([*probs[:2] / probs[:2].sum(), 0, 0]), atol=0.01)
    assert torch.allclose(shares(top_p=0.7), torch.tensor([*probs[:2] / probs[:2].sum(), 0, 0]), atol=0.01)
    assert shares(temperature=0.0)[0] == 1 and shares(top_p=1e-6)[0] == 1
    model, prompts = tiny_model(), [[5], [7, 8, 9], [1, 2]]
    settings = dict(max_new_tokens=20, temperature=1.0, top_k=50)
    together = generate.generate(model, prompts, seed=3, **settings)
    assert together[0] == generate.generate(model, prompts[:1], seed=3, **settings)[0]
    assert together[2] == generate.generate(model, prompts[2:], seed=5, **settings)[0]  # row 2 of seed 3
    assert together != generate.generate(model, prompts, seed=4, **settings)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("script,flags,sentence", [
    ("train", "--rank 0", "--rank is 0; use a whole number of at least 1"),
    ("train", "--data {empty}", "--data holds 0 distinct readable text files"),
    ("train", "--data {empty}/none*.h", "none*.h: no such file, folder or glob match"),
    ("train", "--targets wq", "unknown target 'wq'; use one of c_attn, c_attn.qk"),
    ("train", "--block-size 65", "--block-size 65 is more than the model's context of 64"),
    ("train", "--weights {empty}", "config.json: no such file"),
    ("train", "--data {short} --block-size 64", "tokens, fewer than --block-size 64; give more files"),
    ("train", "--device tpu", "--device tpu: not usable here"),
    ("train", "--out {short}/a.h", "a.h: cannot be made a folder"),
    ("train", "--steps 0", "--steps is 0; use a whole number of at least 1"),
    ("generate", "--prompt a --adapter {empty}", "adapter_config.json: no such file"),
    ("generate", "", "no prompt; give --prompt TEXT or --prompt-file FILE"),
    ("generate", "--prompt a --prompt b --adapter x --adapter y --adapter z", "3 --adapter for 2 prompts"),
    ("generate", "--prompt a --adapter {empty}/x", "x: no such adapter file"),
    ("generate", "--prompt a --adapter {flora1}", "was trained on another base model"),
    ("generate", "--prompt a --suffix b", "has no fill-in-the-middle tokens"),
    ("generate", "--prompt {long}", "tokens, more than the model's context of 64 (n_positions); shorten it"),
    ("generate", "--prompt-file {empty}/x", "not readable as UTF-8 text"),
    ("generate", "--prompt a --temperature -1", "--temperature and --top-k must be at least 0"),
    ("generate", "--prompt a --json {empty}/no/x.json", "x.json: cannot be written"),
])
def test_bad_input_is_one_sentence_and_exit_status_2(
        script, flags, sentence, tiny_folder, embedded_adapters, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    for i, name in enumerate("abc"):
        (tmp_path / "short" / f"{name}.h").write_text(f"int {name};\n" * (i + 1))
    words = dict(empty=tmp_path / "empty", short=tmp_path / "short", long="x," * 40, base=EMBEDDED,
                 flora1=embedded_adapters["flora1"])
    flags = [flag.format(**words) for flag in flags.split()]
    if script == "train":
        flags = tiny_flags(tiny_folder, tmp_path / "out") + flags
    else:
        flags = ["--weights", str(tiny_folder)] + flags
    with pytest.raises(SystemExit) as exit:
        run_script(getattr(sys.modules[script], "main"), [f"{script}.py", *flags], monkeypatch)
    printed = capsys.readouterr()
    assert exit.value.code == 2
    assert sentence in printed.err.splitlines()[-1] and f"{script}.py: error: " in printed.err.splitlines()[-1]


def test_truncation_keeps_the_end_of_a_prompt_and_a_bos():
    ids = [1, 5, 6, 7]
    assert [generate.truncate(ids, room, 1) for room in (9, 4, 3, 2, 1, -3)] == [ids, ids, [1, 6, 7], [1, 7], [7], [7]]
    assert [generate.truncate(ids, room, None) for room in (4, 3, 1)] == [ids, [5, 6, 7], [7]]


def test_a_prompt_that_does_not_fit_is_truncated_only_when_asked(tiny_folder, tmp_path, monkeypatch):
    tokenizer, text = Tokenizer(tiny_folder), "x," * 40 + "y"
    run_script(generate.main, ["generate.py", "--weights", tiny_folder, "--prompt", text, "--truncate",
                               "--max-new-tokens", 4, "--json", tmp_path / "o.json"], monkeypatch)
    alone = generate.generate(GPT.from_pretrained(tiny_folder), [tokenizer.encode(text)[-60:]], max_new_tokens=4)
    assert json.loads((tmp_path / "o.json").read_text())[0]["tokens"] == alone[0]


# ----------------------------------------------------------------------------------------- serving


SERVED = {"gpt_bigcode": [   # kind, rank, targets of the adapters that served_model has by default
    ("flora", 1, None), ("lora", 2, None), ("ia3", 1, None), ("flora", 3, ["c_attn.qk"]),
    ("lora", 1, ["all"]), ("flora", 2, ["all"])]}


def trained(model, adapter_id, seed=0):
    """Move an adapter away from the identity."""
    g = torch.Generator().manual_seed(seed + adapter_id)
    for p in flora.adapter_parameters(model, adapter_id).values():
        p.data += 0.5 * torch.randn(p.shape, generator=g)
    return adapter_id


def served_model(kinds=None, family="gpt_bigcode"):
    torch.manual_seed(0)
    model = GPT(replace(CONFIGS[family], vocab_size=97, n_positions=64, n_embd=64, n_inner=128))
    for kind, rank, targets in SERVED[family] if kinds is None else kinds:
        trained(model, flora.add_adapter(model, kind, rank, targets))
    return model


def served_copy(model):
    """A model of the same weights that has never generated, one FLoRA adapter of rank 2 included."""
    fresh = served_model([("flora", 2, None)], model.config.model_type)
    fresh.load_state_dict(model.state_dict())
    return fresh


def served_requests(n, adapters, seed=0):
    """[(prompt, settings)] of several lengths, adapters and limits."""
    g = torch.Generator().manual_seed(seed)
    def number(lo, hi):
        return int(torch.randint(lo, hi, (1,), generator=g))
    return [(torch.randint(0, 97, (number(1, 20),), generator=g).tolist(),
             dict(adapter_id=number(0, adapters + 1), max_new_tokens=number(1, 12),
                  temperature=(0.0, 0.8)[i % 3 == 2], top_k=20 * (i % 2), top_p=0.9, seed=i))
            for i in range(n)]


def plain(model, prompt, adapter_id=BASE, max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0, seed=0):
    """The reference: one request, no cache, no batch, the whole text again for every token."""
    ids, g = list(prompt), torch.Generator().manual_seed(seed)
    u = torch.rand(max_new_tokens, generator=g)
    for i in range(max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), torch.tensor([adapter_id]))[:, -1]
        settings = torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([top_p])
        ids.append(int(generate.sample(logits, *settings, u[i:i + 1])))
    return ids[len(prompt):]


@pytest.fixture(scope="module")
def model(family):
    return served_model(family=family)


@pytest.fixture(scope="module")
def expected(model):
    """40 requests and what each returns alone; every second one ends before its limit, at an eos_id."""
    adapters = max(layer.num_adapters for _, layer in flora.adapter_layers(model))
    requests, alone = served_requests(40, adapters), []
    for i, (prompt, settings) in enumerate(requests):
        ids = plain(model, prompt, **settings)
        if i % 2:
            settings["eos_id"] = ids[len(ids) // 2]
            ids = ids[:ids.index(settings["eos_id"]) + 1]
        alone.append(ids)
    return requests, alone


def check_served(engine, expected, every=1):
    """Two requests arrive before every `every`-th step, and each returns what it returns alone."""
    requests, alone = expected
    submitted, arrivals, steps = [], iter(requests), 0
    while engine.busy or len(submitted) < len(requests):
        if steps % every == 0:
            for _, (prompt, settings) in zip(range(2), arrivals):
                submitted.append(engine.submit(prompt, **settings))
        steps += 1
        engine.step()
        assert len(engine.running) <= engine.slots
    assert [r.ids for r in submitted] == alone
    assert all(r.state == "done" for r in submitted)


@pytest.mark.parametrize("setting", [
    dict(slots=5), dict(slots=1), dict(slots=64), dict(slots=5, continuous=False),
    dict(slots=5, max_batched_tokens=30)], ids=str)
def test_each_request_returns_what_it_returns_alone(model, expected, setting):
    """Whatever the slots and the budget, in continuous and in static batching."""
    check_served(Engine(model, **setting), expected)


def test_requests_are_the_same_with_the_tokens_read_every_fourth_step(model, expected):
    check_served(Engine(model, slots=5, sync_every=4), expected, every=3)


def test_thousand_requests_in_thousand_results_out_each_reported_once_in_order_of_arrival():
    model = served_model([("flora", 1, None)])
    engine = Engine(model, slots=32)
    requests = [engine.submit([i % 97], adapter_id=i % 2, max_new_tokens=1 + i % 3) for i in range(1000)]
    ended, tokens = [], 0
    while engine.busy:
        for request, ids in engine.step():
            tokens += len(ids)
            ended += [request] if request.state == "done" else []
    assert len(ended) == 1000 and set(ended) == set(requests)
    assert tokens == sum(len(r.ids) for r in requests) == sum(r.max_new_tokens for r in requests)
    first = [r.first_token for r in requests]
    assert first == sorted(first) and all(r.arrived <= r.first_token <= r.ended for r in requests)


def test_a_cancelled_a_failing_and_a_too_long_request_disturb_no_other(model, expected):
    requests, alone = expected
    requests, alone = requests[:8], alone[:8]
    def broken(ids):
        raise KeyError("mine")
    engine = Engine(model, slots=4)
    submitted = [engine.submit(prompt, **settings) for prompt, settings in requests[:4]]
    too_long = engine.submit([1] * 65, max_new_tokens=5)
    unknown = engine.submit([1], adapter_id=77)
    nonsense = engine.submit([97])
    failing = engine.submit([1, 2, 3], max_new_tokens=9, stopped=broken)
    running = engine.submit([4, 5], adapter_id=1, max_new_tokens=50)
    waiting = engine.submit([6], max_new_tokens=5)
    submitted += [engine.submit(prompt, **settings) for prompt, settings in requests[4:]]
    engine.cancel(waiting)
    while engine.busy:
        engine.step()
        if len(running.ids) == 3:
            engine.cancel(running)
    assert [r.ids for r in submitted] == alone
    assert [r.state for r in (running, waiting, failing, too_long)] == ["cancelled"] * 2 + ["failed"] * 2
    assert len(running.ids) == 3 and waiting.ids == []
    assert "65 tokens, more than the model's context of 64 (n_positions); shorten it" in too_long.error
    assert unknown.error == "the model has no adapter 77; load it first"
    assert "outside 0 to 96" in nonsense.error and "stopped() raised KeyError" in failing.error


def test_a_request_ends_at_the_end_of_the_context(model):
    engine = Engine(model, slots=2)
    full, almost = engine.submit([1] * 64), engine.submit([1] * 62, adapter_id=1, max_new_tokens=9)
    engine.run()
    assert (full.state, full.ids, almost.state, len(almost.ids)) == ("done", [], "done", 2)


def test_generate_equals_the_plain_loop(model, expected):
    requests, _ = expected
    prompts, adapter_ids = [p for p, _ in requests[:9]], [s["adapter_id"] for _, s in requests[:9]]
    settings = dict(max_new_tokens=7, temperature=0.7, top_k=30, top_p=0.9)
    got = generate.generate(model, prompts, adapter_ids, seed=3, **settings)
    assert got == [plain(model, p, a, seed=3 + row, **settings)
                   for row, (p, a) in enumerate(zip(prompts, adapter_ids))]


def test_a_model_may_be_trained_changed_and_copied_between_generations(family):
    """Packed copies of the weights (extras/packed.py) follow them, and a gradient never meets one."""
    model, prompt = served_model([("flora", 2, None)], family), [3, 1, 4]
    for _ in range(2):
        expected = plain(served_copy(model), prompt, 1, max_new_tokens=8)
        assert generate.generate(model, [prompt], [1], max_new_tokens=8) == [expected]
        assert generate.generate(copy.deepcopy(model), [prompt], [1], max_new_tokens=8) == [expected]
        with torch.no_grad():
            next(iter(dict(flora.adapter_layers(model)).values())).weight.mul_(-1)
            model.wte.weight.add_(torch.randn(97, 64))
            if family == "llama":
                model.lm_head.weight.add_(torch.randn(97, 64))
    model(torch.tensor([prompt]), torch.tensor([1])).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in flora.adapter_parameters(model, 1).values())


@pytest.mark.parametrize("path", ["example", "token", "masked"])
@pytest.mark.parametrize("T", [1, 7])
def test_lora_variants_equal_the_dense_definition(path, T):
    """y_i = x_i (W0 + (alpha / r) B_i A_i), mixed ranks, the base among them, with and without gather."""
    torch.manual_seed(0)
    layer = flora.AdapterLinear(16, 24)
    layer.num_adapters, layer.lora_path = 3, path
    for i, rank in [(1, 1), (3, 4)]:
        layer.adapters[str(i)] = flora.Adapter("lora", rank, "c_fc", 16, 24)
        torch.nn.init.normal_(layer.adapters[str(i)].A)
    x, ids = torch.randn(5, T, 16), torch.tensor([3, 0, 1, 2, 3])
    with torch.no_grad():
        W = [layer.weight.T + (8 / a.rank * a.B @ a.A if a else 0)
             for a in (layer.adapters[str(i)] if str(i) in layer.adapters else None for i in range(4))]
        dense = torch.stack([x[row] @ W[i] for row, i in enumerate(ids.tolist())]) + layer.bias
        torch.testing.assert_close(layer(x, ids), dense)
        torch.testing.assert_close(layer(x, ids[:, None].expand(5, T)), dense)
        if T == 1:
            torch.testing.assert_close(layer(x, {layer: layer.gather(ids)}), dense)


# ------------------------------------------------------------------------------------ command lines


def script(name, *args, cwd=None):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, os.path.join(HERE, name), *map(str, args)], cwd=cwd, env=env,
                          capture_output=True, text=True)


def write_jsonl(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


ROW_KEYS = {"method", "baseline", "rank", "mode", "request_rate", "tokens_per_second", "ratio_to_base",
            "seconds_per_output_token_mean", "seconds_per_output_token_p50", "seconds_per_output_token_p99",
            "time_to_first_token_mean", "time_to_first_token_p99"}


@pytest.fixture(scope="module", params=FAMILIES)
def served_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    served_model([], request.param).save_pretrained(folder)
    return folder


def test_bench_writes_table_json_and_figure(served_folder, tmp_path, capsys):
    run = script("bench.py", "--weights", served_folder, "--ranks", 1, 2, "--num-requests", 5, "--scale", 0.02,
                 "--mode", "throughput", "latency", "layer", "--layer-tokens", 1, 3, "--repeats", 1, "--slots", 2,
                 "--num-adapters", 3, "--request-rate", 500, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "out" / "bench_cpu.json").read_text())
    assert result.keys() >= {"machine", "model", "dtype", "workload", "limits", "rows", "eq7"}
    methods = 2 + 2 * 4  # base and ia3; flora and three LoRAs at two ranks
    served = [row for row in result["rows"] if row["mode"] != "layer"]
    assert len(served) == 2 * methods and len(result["rows"]) == 4 * methods
    assert all(row.keys() >= ROW_KEYS for row in served)
    assert {row["baseline"] for row in served} == {"base", "ia3", "flora", "lora-token", "lora-example", "lora-masked"}
    assert {row["request_rate"] for row in served if row["mode"] == "latency"} == {500}
    assert all(row["ratio_to_base"] == 1 for row in served if row["method"] == "base")
    assert result["eq7"]["predicted"]["c1"] > 0 and "predicted inflection rank" in run.stdout
    assert (tmp_path / "figures" / "fig2_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.tmp"))
    for row in served:
        assert f"{row['tokens_per_second']:.1f}" in run.stdout
    bench.draw_together(2 * [str(tmp_path / "out" / "bench_cpu.json")], str(tmp_path / "both.png"))
    printed = capsys.readouterr().out
    assert printed.count(served_folder.name) == 2 and "inflection rank, predicted" in printed
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty.json").write_text('{"rows": []}')
    with pytest.raises(BadInput, match="--plot .*empty.json: holds no throughput of flora and lora-token"):
        bench.draw_together([str(tmp_path / "empty.json")], str(tmp_path / "both.png"))


def test_bench_compares_methods_at_equal_parameters_token_by_token(served_folder, tmp_path):
    run = script("bench.py", "--weights", served_folder, "--ranks", 4, "--mode", "token", "--token-length", 5,
                 "--num-requests", 2, "--scale", 0.02, "--repeats", 1, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    rows = {row["baseline"]: row for row in json.loads((tmp_path / "out" / "bench_cpu.json").read_text())["rows"]}
    assert list(rows) == list(bench.TOKEN_ROWS)
    assert {row["mode"] for row in rows.values()} == {"token"} and all(row.keys() >= ROW_KEYS for row in rows.values())
    for name, row in rows.items():
        kind, targets, _, _ = bench.TOKEN_ROWS[name]
        if kind:
            unit = bench.parameters_of(GPT.from_pretrained(served_folder), kind, 1, targets)
            assert row["parameters"] == row["rank"] * unit
            assert abs(row["parameters"] - rows["lora"]["parameters"]) <= unit / 2
        assert f"{row['seconds_per_output_token_mean']:.6f}" in run.stdout


def test_bench_refuses_what_it_cannot_run_in_a_sentence(served_folder, tmp_path, monkeypatch):
    bad, few = tmp_path / "bad.json", tmp_path / "few.json"
    bad.write_text('[{"text": 1}]')
    few.write_text(json.dumps([{"conversations": [{"value": "word " * 50}, {"value": "answer " * 50}]}]))
    for flags, sentence in [
            (["--ranks", "0"], "--ranks is .0.; use whole numbers"), (["--num-adapters", "0"], "--num-adapters is 0"),
            (["--request-rate", "-1"], "--request-rate and --scale must be above 0"),
            (["--model", "starcoder"], "--model needs --random-weights"), (["--random-weights"], "--model needs"),
            (["--scale", "1"], "--scale 1.0: the longest request has .* more than the model's context of 64; use"),
            (["--weights", tmp_path / "nowhere"], "nowhere: no such model folder")]:
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, ["--weights", served_folder, *flags])])
        with pytest.raises(BadInput, match=sentence):
            bench.main()
    with pytest.raises(BadInput, match="no.json: cannot be read"):
        bench.dataset_prompts(tmp_path / "no.json", 1, 0, None)
    with pytest.raises(BadInput, match="bad.json: is not in ShareGPT's JSON format .KeyError"):
        bench.dataset_prompts(bad, 1, 0, None)
    with pytest.raises(BadInput, match="holds 1 conversations of 50 to 2,000 tokens, but --num-requests is 2"):
        bench.dataset_prompts(few, 2, 0, None)
    assert bench.dataset_prompts(few, 1, 0, None) == [(62, 87)]


def test_bench_lengths_follow_the_paper_and_the_seed():
    lengths = bench.synthetic_lengths(4000, 0)
    assert all(50 <= p + n <= 2000 for p, n in lengths)
    assert abs(sum(p for p, _ in lengths) / 4000 - 161) < 10 and abs(sum(n for _, n in lengths) / 4000 - 338) < 15
    assert lengths[:100] == bench.synthetic_lengths(100, 0) != bench.synthetic_lengths(100, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_bench_does_not_time_variants_that_disagree(family):
    fresh = served_model([], family)
    sets = bench.make_adapter_sets(fresh, [("lora", 2), ("flora", 2), ("ia3", 0.5), ("ffba", 2)], 2)
    bench.check_agreement(fresh, sets, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flora, "lora_masked", lambda x, A, B, mask: torch.zeros(*x.shape[:2], A.shape[1]))
        with pytest.raises(RuntimeError, match="lora rank 2: masked differs from example"):
            bench.check_agreement(fresh, sets, torch.float32)


# ------------------------------------------------------------------------------ pass@k by execution


def needs(language):
    """Skip, saying what is missing, where a language cannot be run."""
    try:
        evaluate.interpreter_of(language)
    except BadInput as e:
        pytest.skip(str(e))


@pytest.fixture(params=["namespaces", "no namespaces"])
def sandbox(request, monkeypatch):
    """Both ways to contain programs, with small limits, and a file name that no other process has."""
    if request.param == "namespaces" and evaluate.no_namespaces():
        pytest.skip(f"namespaces are not to be had here: {evaluate.no_namespaces()}")
    needs("py")
    if request.param == "no namespaces":
        monkeypatch.setattr(evaluate, "no_namespaces", lambda: "switched off by a test")
    for name, value in dict(memory=256 << 20, file=1 << 20, disk=4 << 20).items():
        monkeypatch.setitem(evaluate.LIMITS, name, value)
    name = f"hostile-{os.getpid()}-{time.monotonic_ns()}.py"
    monkeypatch.setitem(evaluate.LANGUAGES, "py", evaluate.LANGUAGES["py"]._replace(file=name))
    folder = tempfile.mkdtemp()  # not tmp_path, which other users cannot enter
    os.chmod(folder, 0o755)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    yield name
    os.rmdir(folder)  # nothing is left in it


HOSTILE = {  # (program, seconds it gets, outcomes that are right)
    "forks without end": ("""
import os
while True:
    try:
        os.fork()
    except OSError:
        pass""", 1, {"timeout"}),
    "leaves a daemon": ("""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)""", 60, {"passed"}),
    "writes one large file": ("open('a', 'w').write('x' * 2**24)", 60, {"failed", "limit"}),
    "writes many files": ("""
for i in range(10**9):
    open(f'{i}', 'w').write('x' * 2**19)""", 60, {"failed", "limit"}),
    "prints without end": ("while True: print('x' * 10000)", 60, {"limit"}),
    "prints without end and hides it": ("""
while True:
    try:
        print('x' * 10000, flush=True)
    except OSError:
        pass""", 1, {"timeout", "limit"}),
    "ignores SIGTERM": ("""
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)""", 0.5, {"timeout"}),
    "takes memory without end": ("""
hoard = []
while True:
    hoard.append(bytearray(10**7))""", 60, {"failed"}),
    "exits before its tests": ("import os; os._exit(0)", 60, {"failed"}),
    "prints and exits before its tests": ("print('ok'); raise SystemExit(0)", 60, {"failed"}),
    "deletes its folder": ("import os, shutil; shutil.rmtree(os.getcwd(), ignore_errors=True)", 60, {"passed"}),
    "nests folders without end": ("""
import os
for i in range(1500):
    os.mkdir('d'); os.chdir('d')""", 60, {"passed", "failed", "limit"}),
    "reads standard input": ("import sys; assert sys.stdin.read() == ''", 60, {"passed"}),
}


def left_over(name):
    """Live processes with `name` on their command line, but for this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if name in (folder / "cmdline").read_text() and int(folder.name) != os.getpid():
                found.append(folder.name)
        except OSError:
            pass
    return found


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_program_neither_passes_nor_outlives_its_run(what, sandbox):
    program, timeout, right = HOSTILE[what]
    outcome = evaluate.run_program("py", program, timeout)
    assert outcome.outcome in right, outcome
    assert not left_over(sandbox)


def test_a_namespace_hides_network_processes_and_files(tmp_path, monkeypatch):
    needs("py")
    if evaluate.no_namespaces():
        pytest.skip(f"namespaces are not to be had here: {evaluate.no_namespaces()}")
    monkeypatch.setenv("SECRET", "1")
    tmp_path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        outcome = evaluate.run_program("py", f"""
import os, signal, socket
def refused(act, *args):
    try:
        act(*args)
    except OSError:
        return True
assert refused(socket.create_connection, ("127.0.0.1", {server.getsockname()[1]}), 1)
for file in ("{tmp_path}/a", "/tmp/a", "/dev/shm/a", "/var/tmp/a"):
    assert refused(open, file, "w"), file
open("own", "w").write("x")
assert "SECRET" not in os.environ and refused(os.kill, {os.getpid()}, 0)
refused(os.kill, os.getppid(), signal.SIGSTOP)
refused(os.kill, -1, signal.SIGKILL)""", 60)
    assert outcome.outcome == "passed", outcome


MULTIPLE = {  # language: a prompt, a completion that passes, one that fails, one that leaves, tests as MultiPL-E writes them
    "py": ("def add(a, b):", "\n    return a + b", "\n    return a", "\n    exit(0)", """
def check(candidate):
    assert candidate(1, 2) == 3
def test_check():
    check(add)
test_check()"""),
    "sh": ("add() {", "\n    echo $(($1 + $2))\n}", "\n    echo $1\n}", "\n    echo 3\n}\nexit 0", """
candidate() {
    add "$@"
}
set -e
run_test() {
    [[ $(candidate "1" "2") = "3" ]]
}
run_test"""),
    "pl": ("sub add {", "\n    return $_[0] + $_[1];\n}", "\n    return 1;\n}", "\n    exit 0;\n}", """
sub testhumaneval {
    my $candidate = \\&add;
    if ($candidate->(1, 2) == 3) { print "ok!" } else { print "not okay!"; exit 1; }
}
testhumaneval();"""),
    "js": ("function add(a, b){", "\n  return a + b\n}", "\n  return a\n}", "\n  process.exit(0)\n}", """
const assert = require('node:assert');
function test() {
  let candidate = add;
  assert.deepEqual(candidate(1, 2), 3);
}
test();"""),
    "lua": ("local function add(a, b)", "\n  return a + b\nend", "\n  return a\nend", "\n  os.exit(0)\nend", """
lu = require('luaunit')
function test_humaneval()
    local candidate = add
    lu.assertEquals(candidate(1, 2), 3)
end
os.exit(lu.LuaUnit.run())"""),
    "rb": ("def add(a, b)", "\n  a + b\nend", "\n  a\nend", "\n  exit(0)\nend", """
require 'test/unit'
class TestHumanEval < Test::Unit::TestCase
  def test_add
    candidate = method(:add)
    assert_equal(3, candidate.call(1, 2))
  end
end"""),
    "r": ("add <- function(a, b) {", "\n  a + b\n}", "\n  a\n}", "\n  quit('no', 0)\n}", """
test_humaneval <- function() {
    candidate <- add
    if(!identical(candidate(1, 2), 3)){quit('no', 1)}
}
test_humaneval()"""),
}


@pytest.mark.parametrize("language", MULTIPLE)
def test_multipl_e_programs_pass_fail_and_leave_early_in_every_language(language):
    needs(language)
    prompt, right, wrong, leaving, tests = MULTIPLE[language]
    try:
        evaluate.check_languages([evaluate.Problem("f", "n", language, prompt, tests, [])])
    except BadInput as e:
        pytest.skip(str(e))
    outcomes = [evaluate.run_program(language, f"{prompt}{c}\n{tests}", 60) for c in (right, wrong, leaving, " (")]
    assert [o.outcome for o in outcomes] == ["passed", "failed", "failed", "failed"], outcomes


def add_problems(file, language, names=("a", "b")):
    """A MultiPL-E file whose problems are all `add`."""
    prompt, *_, tests = MULTIPLE[language]
    return write_jsonl(file, [dict(name=name, language=language, prompt=prompt, tests=tests, stop_tokens=["\n\n"])
                              for name in names])


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_pass():
    from itertools import combinations
    for n, c, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 4), (7, 1, 7), (4, 3, 2)]:
        subsets = list(combinations([True] * c + [False] * (n - c), k))
        assert abs(evaluate.pass_at_k(n, c, k) - sum(map(any, subsets)) / len(subsets)) < 1e-12
    assert evaluate.mean_and_error([0.5]) == (0.5, None)
    mean, error = evaluate.mean_and_error([0.0, 1.0, 1.0, 0.5])
    assert mean == 0.625 and abs(error - np.std([0, 1, 1, 0.5], ddof=1) / 2) < 1e-12


def test_known_completions_in_three_languages_get_their_pass_at_k(tmp_path, monkeypatch, capsys):
    """And a run that was cut off does only what is missing, and refuses other settings."""
    languages = ["py", "sh", "pl"]
    for language in languages:
        needs(language)
    files = [add_problems(tmp_path / f"{language}.jsonl", language) for language in languages]
    given = [dict(name=name, file=f"{language}.jsonl", completion=MULTIPLE[language][which])
             for language in languages for name, pattern in [("a", [1, 2, 1]), ("b", [2, 3, 2])] for which in pattern]
    completions, results = write_jsonl(tmp_path / "given.jsonl", given), tmp_path / "out" / "results.jsonl"

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "run", *map(str, flags), "--results", str(results),
                                          "--i-trust-the-code"])
        evaluate.main()
        return capsys.readouterr().out
    flags = [*files, "--completions", completions, "--k", 1, 2, "--json", tmp_path / "out.json", "--timeout", 60]
    table = main(*flags)
    for row in json.loads((tmp_path / "out.json").read_text())["rows"]:
        assert (row["problems"], row["samples"], row["passed"], row["failed"]) == (2, 6, 2, 4)
        assert abs(row["pass@1"] - 1 / 3) < 1e-9 and row["pass@2"] == 0.5     # of a 2/3 and 1, of b 0
        assert abs(row["±1"] - 1 / 3) < 1e-9 and abs(row["±2"] - 0.5) < 1e-9
    assert table.count("0.3333 ± 0.3333") == table.count("0.5000 ± 0.5000") == 3 and "6 of 18 programs passed" in table

    whole = results.read_text().splitlines(keepends=True)
    results.write_text("".join(whole[:16]) + whole[16][:30])
    calls, execute = [], evaluate.execute
    monkeypatch.setattr(evaluate, "execute", lambda completions, *args: execute(calls.extend(completions) or calls, *args))
    assert main(*flags) == table and len(calls) == 2
    again = results.read_text().splitlines(keepends=True)
    assert again[:16] == whole[:16] and len(again) == 18
    with pytest.raises(BadInput, match="results.jsonl: was made with timeout 60.0, not 61.0; move the file away"):
        main(*flags, "--timeout", 61)
    files[0].write_text(files[0].read_text().replace("candidate(1, 2)", "candidate(2, 1)"))
    with pytest.raises(BadInput, match="another form of the problem a of py.jsonl"):
        main(*flags)
    with pytest.raises(BadInput, match="--k 4: needs as many samples of every problem, and there are 3"):
        main(*flags, "--k", 4)


def test_sampled_programs_are_what_the_model_says_alone_cut_at_stops(tmp_path):
    """The embedded model, each sample by a random number of its own, and counted as executed."""
    needs("py")
    model, tokenizer = GPT.from_pretrained(EMBEDDED), Tokenizer(EMBEDDED)
    problems = [evaluate.Problem("f", str(i), "py", f"def f{i}(x):\n", "", ["\n\n", " ="]) for i in range(2)]
    problems.append(problems[0]._replace(name="long", prompt="x " * 600))
    todo = [(p, n) for p in problems for n in range(2)]
    settings = dict(max_new_tokens=24, temperature=0.8, seed=3)
    got = {(p.name, n): (text, tokens, error) for p, n, text, tokens, error in
           evaluate.sample_completions(model, tokenizer, BASE, todo, slots=3, **settings)}
    assert len(got) == 6 and "shorten it" in got["long", 0][2]
    for p, n in todo[:4]:
        alone = {(p.name, n): text for p, n, text, *_ in
                 evaluate.sample_completions(model, tokenizer, BASE, [(p, n)], slots=1, **settings)}
        text, tokens, error = got[p.name, n]
        assert text == alone[p.name, n] and not any(s in text for s in p.stops) and error is None and tokens <= 24
    assert len({text for text, *_ in got.values()}) > 3
    counts = evaluate.evaluate_problems(model, tokenizer, BASE, problems, 2, timeout=60, max_new_tokens=2)
    assert [c.total() for c in counts] == [2, 2, 2] and counts[2] == {"refused": 2}


def test_humaneval_problems_are_scored_by_their_own_solutions(tmp_path, monkeypatch, capsys):
    needs("py")
    problem = dict(task_id="HumanEval/0", prompt="def one():\n", entry_point="one", canonical_solution="    return 1\n",
                   test="def check(candidate):\n    assert candidate() == 1\n")
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as f:
        f.write(json.dumps(problem) + "\n")
    for completions, passed in [("canonical", 1), ("empty", 0)]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "run", str(tmp_path / "HumanEval.jsonl.gz"), "--completions",
                                          completions, "--results", str(tmp_path / completions), "--i-trust-the-code"])
        evaluate.main()
        assert f"{passed} of 1 programs passed" in capsys.readouterr().out


def test_evaluate_refuses_in_a_sentence(tmp_path, monkeypatch):
    good, bad = add_problems(tmp_path / "good.jsonl", "py"), tmp_path / "bad.jsonl"
    line = json.loads(good.read_text().splitlines()[0])
    for text, sentence in [
            ("{", "not readable as JSONL .line 1: "), ("", "holds no problem"), ("[1]", "line 1: is no problem; MultiPL-E"),
            (json.dumps(line | dict(language="cobol")), "language 'cobol' cannot be run here; use one of py, pl"),
            (json.dumps(line | dict(stop_tokens="x")), "stop_tokens is 'x', which is no list of texts"),
            (json.dumps(line) + "\n" + json.dumps(line), "line 2: the name a comes twice")]:
        bad.write_text(text)
        with pytest.raises(BadInput, match=sentence):
            evaluate.read_problems(str(bad))
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    with pytest.raises(BadInput, match="bad.jsonl.gz: not readable"):
        evaluate.read_problems(str(tmp_path / "bad.jsonl.gz"))
    twice = tmp_path / "other" / "good.jsonl"
    twice.parent.mkdir()
    shutil.copy(good, twice)
    for flags, sentence in [
            ([good], "this runs programs that a model wrote .* add --i-trust-the-code"),
            ([good, twice, "--i-trust-the-code"], "two problem files have the same name"),
            ([good, "--i-trust-the-code", "--completions", "canonical"], "a of good.jsonl has no canonical_solution"),
            ([good, "--i-trust-the-code", "--completions", tmp_path / "no"], "--completions .*no: not readable"),
            ([good, "--i-trust-the-code", "--completions", write_jsonl(tmp_path / "c", [{}])], 'needs "task_id" or "name"'),
            ([good, "--i-trust-the-code", "--completions", write_jsonl(tmp_path / "d", [dict(name="z", completion="")])],
             "z is the name of 0 problems"),
            ([good, "--i-trust-the-code", "--completions", write_jsonl(tmp_path / "e", [dict(name="a", completion="")])],
             "has none for b of good.jsonl")]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "run", *map(str, flags)])
        with pytest.raises(BadInput, match=sentence):
            evaluate.main()
    for flags in (["--samples", "0"], ["--k", "0"], ["--timeout", "0"], ["--top-p", "0"], ["--workers", "0"]):
        with pytest.raises(SystemExit) as exit:
            evaluate.parse_args(["run", "f", *flags])
        assert exit.value.code == 2


def test_a_missing_interpreter_or_library_is_named(tmp_path, monkeypatch):
    needs("sh")
    monkeypatch.setitem(evaluate.LANGUAGES, "r", evaluate.Language(("no-such-Rscript",), "p", ""))
    monkeypatch.setitem(evaluate.LANGUAGES, "sh", evaluate.LANGUAGES["sh"]._replace(
        library=("shunit", "source /nowhere/shunit || exit 1")))
    evaluate.interpreter_of.cache_clear()
    with pytest.raises(BadInput, match="problems in r need the program no-such-Rscript, which is not on PATH; install it"):
        evaluate.run_program("r", "")
    plain_sh = evaluate.Problem("f", "n", "sh", "", "true", [])
    evaluate.check_languages([plain_sh])
    with pytest.raises(BadInput, match="problems in sh need bash's shunit, and .*bash cannot run it here .*shunit: No such"):
        evaluate.check_languages([plain_sh, plain_sh._replace(tests=". shunit")])
    evaluate.interpreter_of.cache_clear()


# ------------------------------------------------------------------------------------------ Table 1


def train_here(runs, jobs):
    """evaluate.train_all in this process, for speed."""
    return {folder: train.train(train.parse_args([*flags, "--out", folder])) for folder, flags in runs.items()}


def small_table(command, tiny_folder, out, *flags):
    args = evaluate.parse_args([command, "--weights", str(tiny_folder), "--seeds", "0", "1", "--steps", "4",
                                "--block-size", "32", "--eval-tokens", "500", "--out", str(out),
                                "--png", str(out / "table.png"), *map(str, flags)])
    args.run(args)
    return json.loads((out / "table.json").read_text())


def test_losses_tunes_each_method_and_tells_mean_and_spread_of_real_runs(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "train_all", train_here)
    result = small_table("losses", tiny_folder, tmp_path, "--languages", f"util={Path(HEADERS).parent}:.h",
                         f"core={Path(HEADERS).parents[1] / 'core'}:.h", "--methods", "flora-r1", "ia3-c_attn")
    for language in ("util", "core"):
        for method in ("flora-r1", "ia3-c_attn"):
            cell = result["table"][language][method]
            tried = {float(lr): bits for lr, bits in result["sweep"][method].items()}
            assert min(tried, key=tried.get) not in (min(tried), max(tried))   # the best rate has worse ones on both sides
            logs = [json.loads((tmp_path / language / method / seed / "log.json").read_text()) for seed in "01"]
            assert cell["seeds"] == [log["heldout_bpb_after"] for log in logs]
            assert {log["lr"] for log in logs} == {min(tried, key=tried.get)}
            assert cell["mean"] == pytest.approx(np.mean(cell["seeds"]))
            assert cell["spread"] == pytest.approx(abs(cell["seeds"][0] - cell["seeds"][1]) / 2**0.5)
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    assert "| util | " in capsys.readouterr().out


def test_toys_scores_adapters_by_execution_and_their_own_solutions_pass(tiny_folder, tmp_path, monkeypatch, capsys):
    needs("sh")
    monkeypatch.setattr(evaluate, "train_all", train_here)
    flags = ("--languages", "sh", "--methods", "lora-r4", "--base-steps", "4", "--samples", "1", "--i-trust-the-code")
    solve = {}

    def solutions(model, tokenizer, adapter_id, todo, **settings):   # the adapter of seed 1 knows the first 12 of 48 by heart
        for i, (problem, number) in enumerate(todo):
            knows = adapter_id != BASE and solve["seed"] == 1 and i < 12
            yield problem, number, problem.solution if knows else "", 1, None
        solve["seed"] += adapter_id != BASE
    monkeypatch.setattr(evaluate, "sample_completions", solutions)
    solve["seed"] = 0
    result = small_table("toys", tiny_folder, tmp_path, *flags)
    assert result["table"]["sh"]["base"]["mean"] == 0 and result["base_in_python"] == 0
    assert result["table"]["sh"]["lora-r4"]["seeds"] == [0, 0.25]
    monkeypatch.setattr(evaluate, "sample_completions", lambda *args, **settings: pytest.fail("scores are kept"))
    assert small_table("toys", tiny_folder, tmp_path, *flags)["table"] == result["table"]


def test_toy_problems_are_split_by_task_and_solved_by_their_solutions_in_every_language(tmp_path):
    subprocess.run([sys.executable, HERE / "fixtures" / "make_problems.py", tmp_path], check=True)
    names = None
    for file in sorted(tmp_path.glob("*.jsonl")):
        problems = evaluate.read_problems(file)
        assert names in (None, [p.name for p in problems]) and len(problems) == 48
        names = [p.name for p in problems]
        trained_on = {text.read_text().split("\n")[1 if file.stem == "py" else 0] for text in (tmp_path / file.stem).iterdir()}
        assert not trained_on & {p.prompt.split("\n")[1 if file.stem == "py" else 0] for p in problems}
        needs(file.stem)
        for problem in problems[::6]:
            program = f"{problem.prompt}{problem.solution}\n{problem.tests}"
            assert evaluate.run_program(file.stem, program).outcome == "passed"


def test_trainings_run_apart_keep_what_is_done_and_tell_which_one_failed(tiny_folder, tmp_path):
    flags = [f for f in tiny_flags(tiny_folder, "", "--adapter", "lora") if f]
    flags = flags[:flags.index("--out")] + ["--adapter", "lora"]
    folder = str(tmp_path / "run")
    first = evaluate.train_all({folder: flags}, 1)[folder]
    stamp = os.stat(tmp_path / "run" / "log.json").st_mtime_ns
    assert evaluate.train_all({folder: flags}, 1)[folder] == first
    assert os.stat(tmp_path / "run" / "log.json").st_mtime_ns == stamp
    with pytest.raises(BadInput, match=r"log.json was made with --lr 0.001, not 0.5; choose another --out"):
        evaluate.train_all({folder: [*flags, "--lr", "0.5"]}, 1)
    with pytest.raises(BadInput, match="a training failed, see .*train.txt; its command: python train.py"):
        evaluate.train_all({str(tmp_path / "bad"): [*flags, "--ext", ".nothing"]}, 1)
    assert "at least 2 are needed" in (tmp_path / "bad" / "train.txt").read_text()
