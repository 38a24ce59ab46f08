"""What this project promises, one strong test each. Run: pytest

Most tests use a tiny random model; those of the embedded model say so. Nothing here is timed.
"""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import flora
import generate
import train
from flora import BadInput
from model import EMBEDDED, GPT, PRESETS, GPTConfig, Tokenizer, run_main

HERE = Path(__file__).parent
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU; the cpu case is the same check"))]
TINY = GPTConfig(vocab_size=300, n_positions=48, n_embd=32, n_layer=2, n_head=4, n_inner=64)
MIXED = [("flora", 1, None), ("flora", 4, ["all"]), ("lora", 8, None), ("ia3", 1, None),
         ("flora", 2, ["c_attn.qk"]), ("ia3", 1, ["c_attn.k", "c_fc"]), ("lora", 2, ["c_attn.qk", "c_proj"])]


def tiny_model(seed=0):
    """Random and not near any symmetry: every weight, bias and LayerNorm gain matters."""
    torch.manual_seed(seed)
    model = GPT(TINY)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def random_adapter(model, kind, rank=1, targets=None, size=0.3):
    """Add an adapter as training might have left it, far from the base model."""
    adapter_id = flora.add_adapter(model, kind, rank, targets)
    with torch.no_grad():
        for p in flora.adapter_parameters(model, adapter_id).values():
            p.add_(size * torch.randn_like(p))
    return adapter_id


def layer_with(kind, rank, target="c_attn", d=24, k=36, bias=True):
    """One AdapterLinear shaped like c_attn (head dimension 6) with one random adapter, id 1."""
    torch.manual_seed(rank)
    layer = flora.AdapterLinear(d, k, bias=bias)
    layer.requires_grad_(False)
    layer.adapters["1"], layer.num_adapters = flora.Adapter(kind, rank, target, d, k), 1
    with torch.no_grad():
        for p in layer.adapters["1"].parameters():
            p.add_(0.5 * torch.randn_like(p))
    return layer, layer.adapters["1"]


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
    layer, adapter = layer_with("ia3", 1, "c_attn.k")  # columns [query 24 | key 6 | value 6]
    base = layer(x)
    expected = torch.cat([base[..., :24], adapter.l * base[..., 24:30], base[..., 30:]], dim=-1)
    assert torch.allclose(layer(x, ids), expected, atol=1e-6)
    layer, adapter = layer_with("ia3", 1, "mlp.c_proj")
    assert torch.allclose(layer(x, ids), layer(x * adapter.l), atol=1e-6)


@pytest.mark.parametrize("kind", ["flora", "lora"])
def test_query_and_key_adapters_leave_the_value_columns_alone(kind):
    layer, adapter = layer_with(kind, 2, "c_attn.qk")
    x = torch.randn(3, 7, 24)
    y, base = layer(x, torch.ones(3, dtype=torch.int64)), layer(x)
    assert torch.allclose(y[..., 30:], base[..., 30:], atol=1e-6)
    assert ((y - base)[..., :30].abs().amax(dim=(0, 1)) > 1e-3).all()


@pytest.mark.parametrize("path", ["expand", "materialise"])
def test_per_token_ids_give_each_chunk_its_own_adapter(path):
    model = tiny_model()
    for kind, rank, targets in MIXED:
        random_adapter(model, kind, rank, targets)
    layer = model.transformer.h[0].attn.c_attn
    x = torch.randn(2, 9, 32)
    ids = torch.tensor([[1, 1, 1, 0, 0, 3, 3, 4, 5], [2, 2, 6, 6, 6, 7, 7, 0, 1]])
    y = layer(x, ids, path=path)
    for i in ids.unique():
        alone = layer(x, torch.full((2,), i), path=path)
        assert torch.allclose(y[ids == i], alone[ids == i], atol=1e-5)


@pytest.mark.parametrize("path", ["auto", "expand", "materialise"])
def test_a_batch_of_mixed_kinds_ranks_and_targets_equals_each_row_alone(path):
    """Alone: a model that holds only that one adapter, so neither padding nor numbering is shared."""
    model, alone = tiny_model(), [tiny_model()]
    for kind, rank, targets in MIXED:
        adapter_id = random_adapter(model, kind, rank, targets)
        alone.append(tiny_model())
        flora.add_adapter(alone[-1], kind, rank, targets)
        for mine, other in zip(flora.adapter_parameters(model, adapter_id).values(),
                               flora.adapter_parameters(alone[-1], 1).values()):
            other.data.copy_(mine)
    ids = torch.randint(0, 300, (8, 20))
    for _, layer in flora.adapter_layers(model):
        layer.path = path
    for frozen in (False, True):
        if frozen:
            flora.freeze_bank(model)
        logits = model(ids, torch.tensor([3, 0, 1, 2, 7, 4, 5, 6]))
        for row, adapter_id in enumerate([3, 0, 1, 2, 7, 4, 5, 6]):
            one = alone[adapter_id](ids[row:row + 1], torch.tensor([min(adapter_id, 1)]))
            assert (logits[row] - one[0]).abs().max() < 1e-4
            assert adapter_id == 0 or (logits[row] - logits[1]).abs().max() > 1e-2  # it does something


@pytest.mark.parametrize("rank", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("kind", flora.KINDS)
def test_every_kind_and_rank_starts_as_the_base_model_bit_for_bit(kind, rank):
    model, ids = tiny_model(), torch.randint(0, 300, (2, 9))
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
    layer.adapters["1"], layer.num_adapters = flora.Adapter("flora", 4, "c_attn", 24, 36), 1
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


def test_only_the_adapter_gets_gradients():
    model = tiny_model()
    model.requires_grad_(False)
    adapter_id = flora.add_adapter(model, "flora", 2, ["all"])
    model(torch.randint(0, 300, (2, 9)), torch.tensor([1, 1])).sin().sum().backward()
    trained = flora.adapter_parameters(model, adapter_id)
    assert len(trained) == 2 * 4 * TINY.n_layer
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name in {n.replace(".A", ".adapters.1.A").replace(
            ".B", ".adapters.1.B") for n in trained})


@pytest.mark.parametrize("kind,rank,targets", MIXED)
def test_merging_gives_the_adapted_model(kind, rank, targets):
    model, ids = tiny_model(), torch.randint(0, 300, (2, 9))
    adapter_id, before = random_adapter(model, kind, rank, targets), model.fingerprint
    wanted = model(ids, torch.tensor([adapter_id] * 2))
    flora.merge_adapter(model, adapter_id)
    assert (model(ids) - wanted).abs().max() < 1e-4
    assert model.fingerprint != before
    with pytest.raises(BadInput, match="no adapter 1"):
        flora.adapter_parameters(model, 1)


# ---------------------------------------------------------------------------------- adapter files


@pytest.mark.parametrize("kind,rank,targets", MIXED)
def test_saved_adapters_load_equal_and_carry_their_metadata(kind, rank, targets, tmp_path):
    model, ids = tiny_model(), torch.randint(0, 300, (2, 9))
    adapter_id = random_adapter(model, kind, rank, targets)
    flora.save_adapter(model, adapter_id, tmp_path / "a.safetensors", {"steps": 3})
    other = tiny_model()
    flora.add_adapter(other, "lora", 2)
    loaded = flora.load_adapter(other, tmp_path / "a.safetensors")
    assert loaded == 2 and os.listdir(tmp_path) == ["a.safetensors"]
    assert (other(ids, torch.tensor([2, 2])) - model(ids, torch.tensor([1, 1]))).abs().max() < 1e-5
    from safetensors import safe_open
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        metadata = json.loads(f.metadata()["flora_adapter"])
    assert metadata["kind"] == kind and metadata["base"] == model.fingerprint
    assert metadata["targets"] == list(targets and ["c_attn", "c_proj", "c_fc", "mlp.c_proj"]
                                       if targets == ["all"] else targets or flora.DEFAULT_TARGETS[kind])
    assert metadata["training"] == {"steps": 3}


def test_adapters_keep_their_base_when_it_is_loaded_in_another_dtype(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loads = [GPT.from_pretrained(tmp_path, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float16)]
    assert {m.fingerprint for m in loads} == {tiny_model().fingerprint}


def test_adapter_files_that_do_not_fit_are_refused_in_a_sentence(tmp_path):
    from safetensors.torch import load_file, save_file
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
    ("dora", 1, None, "unknown adapter kind 'dora'; use one of flora, lora, ia3"),
    ("flora", 0, None, "rank is 0; use a whole number of at least 1"),
    ("lora", 1.5, None, "rank is 1.5; use a whole number"),
    ("flora", 1, ["wq"], "unknown target 'wq'; use one of c_attn, c_attn.qk.*or all"),
    ("flora", 1, ["c_attn", "c_attn.qk"], "adapt transformer.h.0.attn.c_attn twice"),
])
def test_adapters_that_cannot_be_are_refused_in_a_sentence(kind, rank, targets, sentence):
    with pytest.raises(BadInput, match=sentence):
        flora.add_adapter(tiny_model(), kind, rank, targets)


# -------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flash", [True, False])
def test_cached_generation_equals_uncached_token_for_token_on_ragged_prompts(flash, device):
    """Uncached: each prompt alone, the whole sequence again for every token."""
    model = tiny_model().to(device)
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


def test_plain_math_attention_equals_scaled_dot_product_attention():
    model, ids = tiny_model(), torch.randint(0, 300, (2, 20))
    fast = model(ids)
    model.set_attention(False)
    assert (model(ids) - fast).abs().max() < 1e-4


def test_gradient_checkpointing_changes_no_gradient():
    model, ids = tiny_model(), torch.randint(0, 300, (2, 20))
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
        "starcoderbase-7b": 7327, "starcoder": 15517}
