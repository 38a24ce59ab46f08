"""What this project promises, one strong test each. Run: pytest

Most tests use a tiny random model; those of the embedded model say so. Nothing here is timed.
"""
import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import bench
import flora
import generate
import train
from flora import BASE
from generate import Engine
from model import GPT, PRESETS, GPTConfig, model_from_config, preset
from plumbing.files import BadInput
from plumbing.flags import EMBEDDED, run_main
from plumbing.tokenizer import Tokenizer

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
TINY = FIXTURES / "tiny"   # a Hugging Face folder that fixtures/make_golden.py made
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU; the cpu case is the same check"))]
# By family: a config, adapters of every kind and some targets, and all targets.
# extras/tests adds families.
CONFIGS = {"gpt_bigcode": GPTConfig(
    vocab_size=300, n_positions=48, n_embd=32, n_layer=2, n_head=4, n_inner=64)}
MIXED = {"gpt_bigcode": [
    ("flora", 1, None), ("flora", 4, ["all"]), ("lora", 8, None), ("ia3", 1, None),
    ("flora", 2, ["c_attn.qk"]), ("ia3", 1, ["c_attn.k", "c_fc"]),
    ("lora", 2, ["c_attn.qk", "c_proj"])]}
ALL = {"gpt_bigcode": ["c_attn", "c_proj", "c_fc", "mlp.c_proj"]}
CONFIG = CONFIGS["gpt_bigcode"]


# What extras/tests runs again, for other families and kinds: a module that imports a test and
# defines one of these fixtures anew gets the test with its own values.


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
    layer.path = path
    y = layer(x, flora.gather(layer, torch.ones(3, dtype=torch.int64, device=device)))
    assert (y - dense).abs().max() < 1e-5
    for got, want in zip(torch.autograd.grad(y.sin().sum(), leaves),
                         torch.autograd.grad(dense.sin().sum(), leaves)):
        assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max())


@pytest.mark.parametrize("ids_shape", ["example", "token"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_lora_equals_dense_W0_plus_BA_scaled_forward_and_backward(rank, ids_shape):
    layer, adapter = layer_with("lora", rank, alpha=3.0)
    x = torch.randn(3, 7, 24, requires_grad=True)
    leaves = [x, adapter.A, adapter.B]
    dense = x @ (layer.weight.T + 3.0 / rank * adapter.B @ adapter.A) + layer.bias
    ids = torch.ones(3, 7, dtype=torch.int64)
    y = layer(x, flora.gather(layer, ids[:, 0] if ids_shape == "example" else ids))
    assert (y - dense).abs().max() < 1e-5
    for got, want in zip(torch.autograd.grad(y.sin().sum(), leaves),
                         torch.autograd.grad(dense.sin().sum(), leaves)):
        assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max())


def test_ia3_scales_outputs_with_their_bias_or_the_inputs_of_mlp_c_proj():
    x, ids = torch.randn(3, 7, 24), torch.ones(3, dtype=torch.int64)
    layer, adapter = layer_with("ia3", 1)
    base = layer(x)
    assert torch.allclose(layer(x, flora.gather(layer, ids)), adapter.l * base, atol=1e-6)
    layer, adapter = layer_with("ia3", 1, (24, 30))  # columns [query 24 | key 6 | value 6]
    base = layer(x)
    expected = torch.cat([base[..., :24], adapter.l * base[..., 24:30], base[..., 30:]], dim=-1)
    assert torch.allclose(layer(x, flora.gather(layer, ids)), expected, atol=1e-6)
    layer, adapter = layer_with("ia3", 1, scales_input=True)
    y = layer(x, flora.gather(layer, ids))
    assert torch.allclose(y, layer(x * adapter.l), atol=1e-6)


@pytest.mark.parametrize("kind", ["flora", "lora", "ia3"])
@pytest.mark.parametrize("target,lo,hi", [
    ("c_attn", 0, 48), ("c_attn.qk", 0, 40), ("c_attn.k", 32, 40)])
def test_an_adapter_of_query_and_key_columns_leaves_all_others_alone(target, lo, hi, kind):
    """c_attn's outputs are 32 of the query, 8 of the key, 8 of the value."""
    model, x = tiny_model(), torch.randn(3, 7, 32)
    random_adapter(model, kind, 2, [target])
    layer = model.transformer.h[0].attn.c_attn
    change = layer(x, flora.gather(layer, torch.ones(3, dtype=torch.int64))) - layer(x)
    inside, change = range(lo, hi), change.abs().amax(dim=(0, 1))
    assert all(change[i] > 1e-3 if i in inside else change[i] < 1e-6 for i in range(48))


@pytest.mark.parametrize("path", ["expand", "materialise"])
def test_per_token_ids_give_each_chunk_its_own_adapter(path):
    model = tiny_model()
    for kind, rank, targets in MIXED["gpt_bigcode"]:
        random_adapter(model, kind, rank, targets)
    layer = model.transformer.h[0].attn.c_attn
    x = torch.randn(2, 9, 32)
    ids = torch.tensor([[1, 1, 1, 0, 0, 3, 3, 4, 5], [2, 2, 6, 6, 6, 7, 7, 0, 1]])
    layer.path = path
    y = layer(x, flora.gather(layer, ids))
    for i in ids.unique():
        alone = layer(x, flora.gather(layer, torch.full((2,), i)))
        assert torch.allclose(y[ids == i], alone[ids == i], atol=1e-5)


@pytest.mark.parametrize("path", ["auto", "expand", "materialise"])
def test_a_batch_of_mixed_kinds_ranks_and_targets_equals_each_row_alone(path, family, mixed):
    """Alone: a model with only that one adapter, so neither padding nor numbering is shared."""
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
    flora.set_path(model, path)
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
        flora.set_path(model, path)
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
        adapters = flora.gather(layer, torch.ones(64, dtype=torch.int64))
        loss = F.mse_loss(layer(x, adapters), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    A, B = layer.adapters["1"].A, layer.adapters["1"].B
    assert torch.linalg.svdvals(B @ A / 4)[3] > 0.1 * torch.linalg.svdvals(B @ A / 4)[0]
    assert loss < 0.05 * wanted.var()


def test_flora_path_is_chosen_from_rank_and_tokens_per_adapter():
    def choice(b, T, rank, ids, dtype=torch.float32):
        return flora.choose_path(torch.empty(b, T, 8, dtype=dtype), rank, torch.tensor(ids))
    assert choice(8, 512, 1, [1] * 8) == "expand"                      # rank 1: Eq. 6 is one matmul
    assert choice(64, 1, 16, [1] * 64) == "expand"                     # decode
    assert choice(4, 256, 16, [1, 2, 3, 4]) == "materialise"           # a prompt
    assert choice(4, 8, 16, [1, 2, 3, 4]) == "expand"                  # four short prompts ...
    assert choice(4, 8, 16, [1, 1, 1, 1]) == "materialise"             # ... and with one adapter
    assert choice(4, 8, 16, [1, 1, 1, 1], torch.bfloat16) == "expand"  # whose matmul is cheaper
    layer, _ = layer_with("flora", 4)
    with pytest.raises(BadInput, match='path is .fast.; use "auto", "expand" or "materialise"'):
        flora.set_path(layer, "fast")


HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@HALF
@pytest.mark.parametrize("path", ["expand", "materialise"])
def test_half_precision_base_costs_an_adapter_no_more_than_it_costs_the_base(dtype, path):
    """Against float64: an adapter near the identity loses little more to rounding than W0 x does.
    All factors are 1 + a, a being less than half a step of the dtype: themselves rounded, they
    would be 1 and the adapter the base."""
    layer, adapter = layer_with("flora", 4, d=128, k=160)
    with torch.no_grad():
        for p in adapter.parameters():
            p.fill_(1 + 0.4 * torch.finfo(dtype).eps)
    x = torch.randn(4, 64, 128).to(dtype)
    layer.weight.data = layer.weight.to(dtype)
    layer.bias.data = layer.bias.to(dtype)
    W0, bias = layer.weight.T.double(), layer.bias.double()
    ids = torch.ones(4, dtype=torch.int64)
    exact = x.double() @ (W0 * (adapter.B.double() @ adapter.A.double() / 4)) + bias
    base = x.double() @ W0 + bias
    base_error = (layer(x).double() - base).pow(2).mean().sqrt()
    layer.path = path
    y = layer(x, flora.gather(layer, ids)).double()
    error = (y - exact).pow(2).mean().sqrt()
    assert adapter.A.dtype == torch.float32 and error < 2.2 * base_error
    left = ((y - base) * base).sum() / ((exact - base) * base).sum()   # of what the adapter does
    assert 0.75 < left < 1.25   # with A or B rounded 0.5, with both 0


@HALF
@pytest.mark.parametrize("kind", ["flora", "lora"])
def test_merging_into_half_precision_rounds_each_weight_once(kind, dtype):
    layer, adapter = layer_with(kind, 4, alpha=3.0)
    layer.weight.data = layer.weight.to(dtype)
    W0, BA = layer.weight.T.double(), adapter.B.double() @ adapter.A.double()
    merged = W0 * BA / 4 if kind == "flora" else W0 + 3.0 / 4 * BA
    with torch.no_grad():
        adapter.merge(None, layer)
    assert (layer.weight.T != merged.to(dtype)).float().mean() < 0.01   # near-ties in float32


def test_a_frozen_bank_follows_adapters_that_come_go_and_are_merged():
    model, ids = tiny_model(), torch.randint(0, 300, (1, 9))
    def change(adapter_id):
        return (model(ids, torch.tensor([adapter_id])) - model(ids)).abs().max()
    random_adapter(model, "flora")
    flora.freeze_bank(model)
    random_adapter(model, "lora")
    assert change(1) > 1e-2 and change(2) > 1e-2
    for leave, adapter_id in [(flora.remove_adapter, 1), (flora.merge_adapter, 2)]:
        flora.freeze_bank(model)
        leave(model, adapter_id)
        assert change(adapter_id) == 0


@pytest.mark.parametrize("path", ["expand", "materialise"])
def test_ids_that_no_adapter_has_are_refused(path):
    model = tiny_model()
    random_adapter(model, "flora")
    flora.set_path(model, path)
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


@pytest.mark.parametrize("lora", [flora.add_lora, bench.lora_per_token])
@pytest.mark.parametrize("T", [1, 7])
def test_lora_paths_equal_the_dense_definition(lora, T):
    """y_i = x_i (W0 + (alpha / r) B_i A_i): mixed ranks and the base, with and without gather."""
    torch.manual_seed(0)
    layer = flora.AdapterLinear(16, 24)
    layer.num_adapters, layer.add_lora = 3, lora
    for i, rank in [(1, 1), (3, 4)]:
        layer.adapters[str(i)] = flora.LoRA(rank, "c_fc", 16, 24)
        torch.nn.init.normal_(layer.adapters[str(i)].A)
    assert_lora_equals_its_definition(layer, T)


def assert_lora_equals_its_definition(layer, T):
    x, ids = torch.randn(5, T, 16), torch.tensor([3, 0, 1, 2, 1])
    with torch.no_grad():
        W = [layer.weight.T] * 4
        for i, a in layer.adapters.items():
            W[int(i)] = layer.weight.T + 8 / a.rank * a.B @ a.A
        dense = torch.stack([x[row] @ W[i] for row, i in enumerate(ids.tolist())]) + layer.bias
        for rows in (flora.gather(layer, ids), flora.gather(layer, ids[:, None].expand(5, T))):
            for _ in range(2):   # rows serve several steps
                torch.testing.assert_close(layer(x, rows), dense)


def test_the_inflection_rank_is_where_eq_7_holds_with_equality():
    """c1 (d + k) / (c2 d k) + 1/r = 1; where d = k, the paper's own form,
    2 c1 / (d c2) + 1/r = 1."""
    for c1, c2, d, k in [(3e-9, 4e-11, 256, 320), (1e-9, 4e-11, 1024, 1024)]:
        rank = flora.inflection_rank(c1, c2, d, k)
        assert c1 * (d + k) / (c2 * d * k) + 1 / rank == pytest.approx(1)
    assert 2 * c1 / (d * c2) + 1 / rank == pytest.approx(1)
    assert flora.inflection_rank(1e-6, 1e-11, 256, 256) == float("inf")
    assert bench.free_rank(32, 295) == pytest.approx(9.2, abs=0.05)   # batch 32 on an H100


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
            logits = model(torch.tensor([ids + want], device=device),
                           torch.tensor([adapter_id], device=device))
            want.append(int(logits[0, -1].argmax()))
        assert got == want
    assert len({tuple(n) for n in new}) == 4


def calls_of(module, name, monkeypatch):
    """A list that grows with each call of module.name."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **b: calls.append(1) or function(*a, **b))
    return calls


def test_plain_math_attention_equals_scaled_dot_product_attention(family, monkeypatch):
    model, ids = tiny_model(family), torch.randint(0, 300, (2, 20))
    calls = calls_of(F, "scaled_dot_product_attention", monkeypatch)
    fast = model(ids)
    assert len(calls) == model.config.n_layer
    model.set_attention(False)
    assert (model(ids) - fast).abs().max() < 1e-4
    assert len(calls) == model.config.n_layer


def test_gradient_checkpointing_changes_no_gradient(family, monkeypatch):
    model, ids = tiny_model(family), torch.randint(0, 300, (2, 20))
    model.requires_grad_(False)
    random_adapter(model, "flora", 2)
    grads, calls = [], calls_of(sys.modules["model"], "checkpoint", monkeypatch)
    for model.gradient_checkpointing in (False, True):
        loss = model(ids, torch.tensor([1, 1])).sin().sum()
        grads.append(torch.autograd.grad(loss, list(flora.adapter_parameters(model, 1).values())))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))
    assert len(calls) == model.config.n_layer   # and not in the first of the two runs


def test_presets_have_the_published_sizes():
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in GPT(config).parameters())
                 for name, config in PRESETS.items()}
    assert {name: round(size / 1e6) for name, size in sizes.items()} == {
        "tiny_starcoder_py": 164, "starcoderbase-1b": 1137, "starcoderbase-3b": 3043,
        "starcoderbase-7b": 7327, "starcoder": 15517, "starcoder-cpu": 27}
    sentence = "--model starcoder-9b: unknown; use one of tiny_starcoder_py, starcoderbase-1b"
    with pytest.raises(BadInput, match=sentence):
        preset("starcoder-9b")


# ---------------------------------------------------- golden values: Hugging Face transformers 5.24


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
    flags = ["--weights", tiny_folder, "--data", HEADERS, "--steps", 40, "--block-size", 32,
             "--eval-every", 10, "--eval-tokens", 500, "--out", out, *flags]
    return [str(flag) for flag in flags]


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


def test_the_loop_is_adam_with_accumulation_clipping_warm_up_and_a_cosine(tmp_path):
    """Against the recipe written out in float64: AdamW's betas 0.9 and 0.95, no weight decay, two
    steps of warm-up, then a cosine from the peak down to a tenth."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 2, 8, 5), torch.randn(6, 2, 8)   # [step, micro, example, input]
    model = torch.nn.Linear(5, 1, bias=False)
    w, m, v, clipped, means = model.weight.detach().double()[0], 0, 0, [], []
    loop = train.Loop(steps=6, grad_accum=2, tokens_per_step=1, lr=0.1, warmup=2, clip=1.2,
                      eval_every=1, dtype="float32", compile=False, out=str(tmp_path),
                      made_with={}, resume=False)
    log, _ = train.fit(model, dict(model.named_parameters()), lambda *at: (x[at], y[at]),
                       lambda model, x, y: F.mse_loss(model(x)[:, 0], y), float, loop,
                       torch.zeros(1))
    for t, share in enumerate([0.5, 1, 1, 0.868198, 0.55, 0.231802]):
        error = x[t].double() @ w - y[t]                   # [2, 8]
        g = 2 * (error[..., None] * x[t]).mean((0, 1))     # of the mean over both micro-batches
        clipped.append(bool(g.norm() > 1.2))
        g = g * min(1, 1.2 / g.norm())
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - 0.1 * share * m / (1 - 0.9**(t + 1)) / (v / (1 - 0.95**(t + 1))).sqrt()
        means.append(error.pow(2).mean().item())
    assert (model.weight[0] - w).abs().max() < 1e-5 and len(set(clipped)) == 2
    assert [p["loss"] for p in log[1:]] == pytest.approx(means, abs=1e-5)


def test_texts_are_trained_on_with_an_end_before_each_and_measured_token_by_token(tiny_folder):
    """Held-out tokens are predicted once each, in blocks of 8, and their padding counts nothing."""
    model, tokenizer = GPT.from_pretrained(tiny_folder), Tokenizer(tiny_folder)
    training = ["int a;\n" * 9, "float b(int);\n" * 9, "x"]
    heldout = [f"struct s{i} {{ long n; }};\n" * (1 + i % 3) for i in range(9)]
    args = Namespace(steps=50, tokens_per_step=50, block_size=8, eval_tokens=9999)
    data = train.encode_data(args, (training, heldout), tokenizer)
    eos = tokenizer.eos_id
    assert data.tokens.tolist() == [
        i for text in training for i in (eos, *tokenizer.encode(text))]
    losses = []
    for ids in ([eos, *tokenizer.encode(text)] for text in heldout):
        for at in range(1, len(ids)):
            block = ids[(at - 1) // 8 * 8:at]
            losses.append(-model(torch.tensor([block]))[0, -1].log_softmax(-1)[ids[at]].item())
    measured = train.heldout_loss(model, data, None, "float32")
    assert measured == pytest.approx(np.mean(losses)) and len(losses) % 8
    bits = sum(losses) / np.log(2) / len("".join(heldout))
    assert data.bits_per_byte(measured) == pytest.approx(bits)


def test_training_lowers_heldout_loss_and_a_seed_gives_the_same_losses_twice(
        kind, tiny_folder, tmp_path):
    flags = ["--adapter", kind, "--targets", "all", "--lr", 0.02]
    report = check_training(tiny_folder, tmp_path, *flags)
    model = GPT.from_pretrained(tiny_folder)
    saved = flora.adapter_parameters(model, flora.load_adapter(model, report["adapter_file"]))
    assert sum(p.numel() for p in saved.values()) == report["trainable_parameters"]


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
    """Save adapters of the embedded model, given as (name, kind, rank, distance from the base)
    -> {name: file}."""
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


def test_generation_ends_after_end_of_text_and_at_the_end_of_the_context():
    model = tiny_model()
    free = generate.generate(model, [[5, 6], [9] * 40], max_new_tokens=100)
    assert [len(row) for row in free] == [46, 8]
    eos = free[0][4]
    ended = generate.generate(model, [[5, 6], [9] * 40], max_new_tokens=100, eos_id=eos)
    assert ended[0] == free[0][:free[0].index(eos) + 1]
    sentence = "a prompt has 49 tokens, more than the model's context of 48"
    with pytest.raises(BadInput, match=sentence):
        generate.generate(model, [[1] * 49])


def alone(model, prompt, **settings):
    """The new ids of one request of an Engine."""
    engine = Engine(model, slots=1)
    request = engine.submit(prompt, **settings)
    engine.run()
    return request.ids


def test_rows_and_runs_of_other_seeds_draw_apart():
    """Four equal prompts are four samples, and another seed repeats none of them."""
    model, settings = tiny_model(), dict(max_new_tokens=12, temperature=1.0)
    runs = [generate.generate(model, [[5]] * 4, seed=seed, **settings) for seed in (0, 1, 0)]
    assert len({tuple(row) for run in runs[:2] for row in run}) == 8
    assert runs[0] == runs[2]
    assert runs[0][:2] == generate.generate(model, [[5]] * 2, seed=0, **settings)


def test_sampling_follows_the_distribution_and_no_row_depends_on_its_neighbours():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0))

    def shares(temperature=1.0, top_k=0, top_p=1.0):
        n = len(u)
        settings = [torch.full((n,), value) for value in (temperature, top_k, top_p)]
        picked = generate.sample(logits.expand(n, -1), *settings, u)
        return torch.bincount(picked, minlength=4) / n

    probs = logits[0].softmax(-1)
    assert torch.allclose(shares(), probs, atol=0.01)
    assert torch.allclose(shares(temperature=0.5), (2 * logits[0]).softmax(-1), atol=0.01)
    best_two = torch.tensor([*probs[:2] / probs[:2].sum(), 0, 0])
    assert torch.allclose(shares(top_k=2), best_two, atol=0.01)
    assert torch.allclose(shares(top_p=0.7), best_two, atol=0.01)
    assert torch.allclose(shares(top_k=3, top_p=0.9), best_two, atol=0.01)   # 0.91 of three's mass
    assert shares(temperature=0.0)[0] == 1 and shares(top_p=1e-6)[0] == 1
    model, prompts = tiny_model(), [[5], [7, 8, 9], [1, 2]]
    settings = dict(max_new_tokens=20, temperature=1.0, top_k=50)
    together = generate.generate(model, prompts, seed=3, **settings)
    assert together[0] == generate.generate(model, prompts[:1], seed=3, **settings)[0]
    assert together[2] == alone(model, prompts[2], seed=generate.row_seed(3, 2), **settings)
    assert together != generate.generate(model, prompts, seed=4, **settings)


# ----------------------------------------------------------------------------------------- serving


# By family: kind, rank, targets of the adapters of one served model. extras/tests adds families.
SERVED = {"gpt_bigcode": [
    ("flora", 1, None), ("lora", 2, None), ("ia3", 1, None), ("flora", 3, ["c_attn.qk"]),
    ("lora", 1, ["all"]), ("flora", 2, ["all"])]}


@pytest.fixture(scope="module")
def served(family):
    return SERVED[family]


@pytest.fixture(scope="module")
def model(family, served):
    return served_model(served, family)


@pytest.fixture(scope="module")
def expected(model):
    """40 requests and what each returns alone; every second one ends early, at an eos_id."""
    adapters = max(layer.num_adapters for _, layer in flora.adapter_layers(model))
    requests, alone = served_requests(40, adapters), []
    for i, (prompt, settings) in enumerate(requests):
        ids = plain(model, prompt, **settings)
        if i % 2:
            settings["eos_id"] = ids[len(ids) // 2]
            ids = ids[:ids.index(settings["eos_id"]) + 1]
        alone.append(ids)
    return requests, alone


def trained(model, adapter_id, seed=0):
    """Move an adapter away from the identity."""
    g = torch.Generator().manual_seed(seed + adapter_id)
    for p in flora.adapter_parameters(model, adapter_id).values():
        p.data += 0.5 * torch.randn(p.shape, generator=g)
    return adapter_id


def served_model(kinds=None, family="gpt_bigcode"):
    torch.manual_seed(0)
    model = model_from_config(
        replace(CONFIGS[family], vocab_size=97, n_positions=64, n_embd=64, n_inner=128))
    for kind, rank, targets in SERVED[family] if kinds is None else kinds:
        trained(model, flora.add_adapter(model, kind, rank, targets))
    return model


def served_requests(n, adapters, seed=0):
    """[(prompt, settings)] of several lengths, adapters and limits."""
    g = torch.Generator().manual_seed(seed)
    def number(lo, hi):
        return int(torch.randint(lo, hi, (1,), generator=g))
    return [(torch.randint(0, 97, (number(1, 20),), generator=g).tolist(),
             dict(adapter_id=number(0, adapters + 1), max_new_tokens=number(1, 12),
                  temperature=(0.0, 0.8)[i % 3 == 2], top_k=20 * (i % 2), top_p=0.9, seed=i))
            for i in range(n)]


def plain(model, prompt, adapter_id=BASE, max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0,
          seed=0):
    """The reference: one request, no cache, no batch, the whole text again for every token."""
    ids, g = list(prompt), torch.Generator().manual_seed(seed)
    u = torch.rand(max_new_tokens, generator=g)
    for i in range(max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), torch.tensor([adapter_id]))[:, -1]
        settings = torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([top_p])
        ids.append(int(generate.sample(logits, *settings, u[i:i + 1])))
    return ids[len(prompt):]


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


@pytest.mark.parametrize("requests,settings,steps", [   # (prompt tokens, new tokens)
    ([(9, 1), (9, 3), (9, 2)], dict(slots=2), [["2x9", "1x1"], ["1x9", "2x1"], []]),
    ([(9, 1), (9, 3), (9, 2)], dict(slots=2, continuous=False),
     [["2x9", "1x1"], ["1x1"], [], ["1x9", "1x1"], []]),
    ([(9, 2)] * 4, dict(slots=4, max_batched_tokens=20), [["2x9", "2x1"], ["2x9", "2x1"], []]),
    ([(9, 3), (9, 3), (10, 3), (10, 1)], dict(slots=4, max_batched_tokens=20),
     [["2x9", "2x1"], ["1x10", "3x1"], ["1x10", "1x1"], []]),
    ([(2, 2), (9, 2), (30, 1)], dict(slots=4, max_batched_tokens=17),
     [["1x2", "1x1"], ["1x9", "1x1"], [], ["1x30"]])])
def test_a_step_runs_the_prompts_that_slots_budget_and_static_batching_let_in(
        requests, settings, steps):
    """What the model is called with in each step: rows x tokens."""
    model, calls = served_model([]), []
    hidden = model.hidden
    model.hidden = lambda ids, *rest: calls.append("%dx%d" % ids.shape) or hidden(ids, *rest)
    engine, seen = Engine(model, **settings), []
    for prompt, new in requests:
        engine.submit([1] * prompt, max_new_tokens=new)
    while engine.busy:
        engine.step()
        seen.append(calls.copy())
        calls.clear()
    assert seen == steps


def test_requests_are_the_same_with_the_tokens_read_every_fourth_step(model, expected):
    check_served(Engine(model, slots=5, sync_every=4), expected, every=3)


def test_thousand_requests_in_thousand_results_out_each_reported_once_in_order_of_arrival():
    model = served_model([("flora", 1, None)])
    engine = Engine(model, slots=32)
    requests = [engine.submit([i % 97], adapter_id=i % 2, max_new_tokens=1 + i % 3)
                for i in range(1000)]
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
    assert (running.state, waiting.state) == ("cancelled", "cancelled")
    assert (failing.state, too_long.state) == ("failed", "failed")
    assert len(running.ids) == 3 and waiting.ids == []
    sentence = "65 tokens, more than the model's context of 64 (n_positions); shorten it"
    assert sentence in too_long.error
    assert unknown.error == "the model has no adapter 77; load it first"
    assert "outside 0 to 96" in nonsense.error and "stopped() raised KeyError" in failing.error


def poison(model, adapter_id, values):
    """An adapter that diverged (NaN) or overflows (large but finite in float16)."""
    for p in flora.adapter_parameters(model, adapter_id).values():
        p.data.fill_(values)


@pytest.mark.parametrize("values,dtype", [(float("nan"), torch.float32), (6e4, torch.float16)])
def test_a_request_that_is_not_finite_fails_alone_and_leaves_nothing_behind(
        kind, values, dtype, family, engine_class):
    """200 requests, 1 in 10 of them poisoned, in every slot and beside every other."""
    model = served_model([(kind, 2, None), ("flora", 1, None), ("lora", 2, None)], family).to(dtype)
    for name, p in model.named_parameters():
        p.data = p.data.float() if ".adapters." in name else p.data
    healthy = [(prompt, settings | dict(adapter_id=(0, 2, 3)[i % 3], temperature=0.0))
               for i, (prompt, settings) in enumerate(served_requests(10, 3))]
    alone = []
    for prompt, settings in healthy:
        engine = engine_class(model, slots=1)
        request = engine.submit(prompt, **settings)
        engine.run()
        alone.append(request.ids)
    poison(model, 1, values)
    engine, requests = engine_class(model, slots=8), []
    for i in range(200):
        prompt, settings = healthy[i % 10]
        if i % 10 == 7:
            settings = settings | dict(adapter_id=1)
        requests.append(engine.submit(prompt, **settings))
    engine.run()
    for i, request in enumerate(requests):
        if request.adapter_id == 1:
            assert request.state == "failed" and "its logits are not finite" in request.error
        else:
            assert request.state == "done" and request.error is None
            assert request.ids == alone[i % 10]


@pytest.fixture
def engine_class():
    return Engine


def test_a_request_ends_at_the_end_of_the_context(model):
    engine = Engine(model, slots=2)
    full, almost = engine.submit([1] * 64), engine.submit([1] * 62, adapter_id=1, max_new_tokens=9)
    engine.run()
    assert (full.state, almost.state, len(almost.ids)) == ("done", "done", 2)
    assert full.ids == [model(torch.ones(1, 64, dtype=torch.int64))[0, -1].argmax().item()]
    sampled = engine.submit([1] * 64, temperature=1.0)
    engine.run()
    assert sampled.state == "done" and len(sampled.ids) == 1


def test_generate_equals_the_plain_loop(model, expected):
    requests, _ = expected
    prompts, adapter_ids = [p for p, _ in requests[:9]], [s["adapter_id"] for _, s in requests[:9]]
    settings = dict(max_new_tokens=7, temperature=0.7, top_k=30, top_p=0.9)
    got = generate.generate(model, prompts, adapter_ids, seed=3, **settings)
    assert got == [plain(model, p, a, seed=generate.row_seed(3, row), **settings)
                   for row, (p, a) in enumerate(zip(prompts, adapter_ids))]


# ------------------------------------------------------------------------------------------- bench


def test_bench_does_not_time_variants_that_disagree(family):
    fresh = served_model([], family)
    sets = bench.make_adapter_sets(fresh, [("lora", 2), ("flora", 2), ("ia3", 0.5)], 2)
    bench.check_agreement(fresh, sets, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "lora_per_token", lambda y, x, rows: y)
        with pytest.raises(RuntimeError, match="lora rank 2: token differs from example"):
            bench.check_agreement(fresh, sets, torch.float32)


def test_measured_free_and_inflection_ranks():
    """FLoRA keeps 0.97 of the base at ranks 1 and 2, and loses to LoRA halfway between 2 and 4."""
    speeds = {("base", None): 100, **{("flora", r): v for r, v in [(1, 100), (2, 97), (4, 80)]},
              **{("lora-token", r): v for r, v in [(1, 50), (2, 97 / 1.5), (4, 160)]}}
    rows = [dict(mode="throughput", baseline=name, rank=rank, tokens_per_second=v,
                 ratio_to_base=v / 100)
            for (name, rank), v in speeds.items()]
    assert bench.measured_free_ranks(rows, "flora") == [1, 2]
    assert bench.measured_free_ranks(rows, "flora-eq6") is None
    assert bench.measured_inflection(rows, "lora-token") == pytest.approx(3)
    assert bench.measured_inflection(rows, "lora-example") is None
