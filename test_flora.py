"""What this project promises, one strong test each. Run: pytest

Most tests use a tiny random model; those of the embedded model say so. Nothing here is timed.
"""
import contextlib
import copy
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import bench
import flora
import generate
import train
from flora import BASE, BadInput
from generate import Engine
from model import (EMBEDDED, GPT, JSON, PNG, PRESETS, GPTConfig, Tokenizer, check_writable, locked,
                   model_from_config, preset, run_main, write_each)

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


# ------------------------------------------------------------------------- the core without extras/

DRIVER = """
import shlex, sys, importlib
from model import run_main
for line in sys.stdin:
    script, *sys.argv[1:] = shlex.split(line)
    sys.argv[0] = f"{script}.py"
    try:
        run_main(importlib.import_module(script).main)
    except SystemExit as e:
        print("exit status", e.code, file=sys.stderr)
"""


def test_the_core_is_complete_without_extras(tiny_folder, tmp_path):
    """A copy without the folder trains, generates, measures and is tested; what extras/ would add
    is refused in a sentence that names the file."""
    core = tmp_path / "core"
    core.mkdir()
    for file in HERE.glob("*.py"):
        shutil.copy(file, core)
    for folder in ("base", "fixtures"):
        (core / folder).symlink_to(HERE / folder)
    train = " ".join(["train", *tiny_flags(tiny_folder, "OUT", "--steps", 2)])
    lines = [train.replace("OUT", f"out/{kind}") + f" --adapter {kind}" for kind in flora.KINDS]
    files = [f"--adapter out/{kind}/adapter.safetensors" for kind in flora.KINDS]
    prompts = "--prompt 'int a' --max-new-tokens 2 --json out/generated.json"
    lines += [f"generate --weights {tiny_folder} --adapter none {' '.join(files)} {prompts}",
              f"bench --weights {tiny_folder} --ranks 1 2 --num-requests 3 --scale 0.02 --slots 2 "
              "--num-adapters 2 --repeats 1 --json out/bench.json --png out/bench.png"]
    train_x, llama_folder = train.replace("OUT", "out/x"), FIXTURES / "tiny_llama"
    refused = {
        f"{train_x} --adapter ffba": "there is no extras/ffba.py for it",
        f"{train_x} --adapter none": "--adapter none needs extras/pretrain.py",
        f"generate --weights {llama_folder} --prompt a": "there is no extras/llama.py for it",
        f"generate --weights {tiny_folder} --adapter out --prompt a": "needs extras/peft.py",
        f"generate --weights {tiny_folder} --quantize int8 --prompt a": "needs extras/int8.py",
        f"generate --weights {tiny_folder} --requests a --results b": "needs extras/requests.py",
        f"bench --weights {tiny_folder} --rows lora-masked": "needs extras/bench_more.py"}
    ran = subprocess.run([sys.executable, "-c", DRIVER], cwd=core, capture_output=True, text=True,
                         input="\n".join([*lines, *refused]),
                         env=os.environ | {"PYTHONPATH": str(core)})
    errors = ran.stderr.splitlines()
    assert ran.returncode == 0 and "Traceback" not in ran.stderr, ran.stderr
    assert errors.count("exit status 2") == len(refused), ran.stderr
    sentences = [errors[i - 1] for i, line in enumerate(errors) if line == "exit status 2"]
    for sentence, expected in zip(sentences, refused.values()):
        assert expected in sentence
    assert len(json.loads((core / "out/generated.json").read_text())) == 1 + len(flora.KINDS)
    rows = json.loads((core / "out/bench.json").read_text())["rows"]
    assert {row["baseline"] for row in rows} >= {
        "base", "ia3", "flora", "lora-example", "lora-token"}
    tests = "equals_dense or mixed or hugging_face or refused"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests]
    suite = subprocess.run(command, cwd=core, capture_output=True, text=True)
    assert suite.returncode == 0 and " passed" in suite.stdout, suite.stdout


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
    ids = torch.ones(3, 7, dtype=torch.int64)
    y = layer(x, ids[:, 0] if ids_shape == "example" else ids)
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
    """y_i = x_i (W0 + (alpha / r) B_i A_i): mixed ranks and the base, with and without gather."""
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
    """c1 (d + k) / (c2 d k) + 1/r = 1; where d = k, the paper's own form,
    2 c1 / (d c2) + 1/r = 1."""
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


@pytest.mark.parametrize("kind,rank,targets,sentence", [
    ("dora", 1, None,
     "unknown adapter kind 'dora'; use one of flora, lora, ia3, or a kind that extras/ holds"),
    ("lora", 1, ["attn"], "unknown target 'attn'; use one of c_attn"),
    ("flora", 0, None, "rank is 0; use a whole number of at least 1"),
    ("lora", 1.5, None, "rank is 1.5; use a whole number"),
    ("flora", 1, ["wq"], "unknown target 'wq'; use one of c_attn, c_attn.qk.*or all"),
    ("flora", 1, ["q_proj"],
     "unknown target 'q_proj'; use one of c_attn, c_attn.qk, .*mlp.c_proj, or all"),
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


def test_saved_folder_keeps_every_tensor_of_hugging_face(tiny, golden, name, tmp_path):
    tiny.save_pretrained(tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    theirs = load_file(FIXTURES / f"tiny{name}" / "model.safetensors")
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
    head = {"lm_head.weight": "model-1.safetensors"}   # a tied one is in no shard
    index.write_text(json.dumps({"weight_map": head | weight_map}))
    assert loads()
    (tmp_path / "model-2.safetensors").unlink()
    sentence = "model-2.safetensors: this shard, named in .*index.json, is missing"
    with pytest.raises(BadInput, match=sentence):
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


CODE = ("def f(x):\n\t  return x  # é ▁▁ 漢字 🙂\r\n\n"
        "    if x == 10:\n        pass\x00 \n   \n<|endoftext|>\n")


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


def copy_of_tiny(folder, **config):
    shutil.copytree(TINY, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def test_every_end_token_of_a_folder_ends_a_text_and_none_is_in_it(tmp_path):
    """generation_config.json comes first, then config.json; as in transformers."""
    folder = copy_of_tiny(tmp_path / "a", eos_token_id=[2, 7])
    assert Tokenizer(folder).eos_ids == [2, 7]
    assert GPT.from_pretrained(folder).config.eos_token_id == [2, 7]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 250]}))
    tokenizer, model = Tokenizer(folder), GPT.from_pretrained(folder)
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (9, [9, 250])
    prompts = [tokenizer.encode("def f(")]
    free = generate.generate(model, prompts, max_new_tokens=12)[0]
    for eos in (free[3], free[:4], [300 - 1, *free[2:3]]):
        end = min(free.index(i) for i in generate.as_list(eos) if i in free)
        ids = generate.generate(model, prompts, max_new_tokens=12, eos_id=eos)[0]
        assert ids == free[:end + 1]
    assert generate.new_text(tokenizer, [9, *tokenizer.encode("x"), 250]) == "x"
    for bad in ([300], -1, "x", [True]):
        copy_of_tiny(tmp_path / f"bad{bad}", eos_token_id=bad)
        for load in (Tokenizer, GPT.from_pretrained):
            with pytest.raises(BadInput, match="eos_token_id"):
                load(tmp_path / f"bad{bad}")


def test_what_training_scripts_leave_in_a_tokenizer_json_changes_no_text(tmp_path):
    """Truncation and padding are off; a prefix space stands at the start of a prompt alone."""
    from tokenizers import Tokenizer as HFTokenizer
    folder, text = copy_of_tiny(tmp_path / "a"), "def fibonacci(n):\n    return n"
    hf = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    hf.enable_truncation(4)
    hf.enable_padding(length=9)
    hf.save(str(folder / "tokenizer.json"))
    assert Tokenizer(folder).encode(text) == Tokenizer(TINY).encode(text)
    values = json.loads((TINY / "tokenizer.json").read_text())
    steps = values["pre_tokenizer"].get("pretokenizers", [values["pre_tokenizer"]])
    changed = [step for step in steps if step["type"] == "ByteLevel"]
    changed[0]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("x")) == " x"
    for text in ("return", " return", "\n    return 1"):
        assert tokenizer.decode(Tokenizer(TINY).encode(text), continues=True) == text


def test_text_that_the_model_has_no_ids_for_is_refused_by_tokenizer_and_training(tmp_path):
    folder = copy_of_tiny(tmp_path / "a")
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"].append(values["added_tokens"][0] | {"id": 300, "content": "<extra>"})
    (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("a<fim_pad>b") and tokenizer.decode([300]) == "<extra>"
    for text, sentence in [
            ("a<extra>b", "a text has token id 300, but the model of .* has ids 0 to 299"),
            ("caf\udce9", "half of a surrogate pair .*not Unicode")]:
        with pytest.raises(BadInput, match=sentence):
            tokenizer.encode(text)
    data = tmp_path / "data"
    data.mkdir()
    for i in range(6):
        (data / f"{i}.py").write_text(f"x = {i}\n" * 9 + "<extra>")
    flags = tiny_flags(folder, tmp_path / "out", "--data", data, "--keep-duplicates",
                       "--block-size", 8)
    with pytest.raises(BadInput, match="token id 300"):
        train.train(train.parse_args(flags))


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


def test_training_lowers_heldout_loss_and_a_seed_gives_the_same_losses_twice(
        kind, tiny_folder, tmp_path):
    flags = ["--adapter", kind, "--targets", "all", "--lr", 0.02]
    report = check_training(tiny_folder, tmp_path, *flags)
    model = GPT.from_pretrained(tiny_folder)
    saved = flora.adapter_parameters(model, flora.load_adapter(model, report["adapter_file"]))
    assert sum(p.numel() for p in saved.values()) == report["trainable_parameters"]


def test_a_training_ends_with_samples_of_the_base_and_of_the_saved_adapter(
        tiny_folder, tmp_path, capsys):
    """Each as it is when generated alone."""
    args = train.parse_args(tiny_flags(tiny_folder, tmp_path, "--steps", 2, "--lr", 0.1))
    report, printed = train.train(args), capsys.readouterr().out
    model, tokenizer = GPT.from_pretrained(tiny_folder), Tokenizer(tiny_folder)
    ids = [BASE, flora.load_adapter(model, report["adapter_file"])]
    for n, text in enumerate(train.load_texts(args)[1][:3]):
        prompt = tokenizer.encode(text[text.find("\n", len(text) // 2) + 1:])[:16]
        base, adapter = (
            generate.generate(model, [prompt], [i], max_new_tokens=40, temperature=0.8,
                              seed=args.seed + 2 * n + j)[0] for j, i in enumerate(ids))
        base, adapter = (tokenizer.decode(text, continues=True) for text in (base, adapter))
        assert (f"=== held out\n{tokenizer.decode(prompt)}\n--- base\n{base}\n"
                f"--- adapter\n{adapter}\n") in printed


def start_train(*args, launcher=()):
    return subprocess.Popen([sys.executable, *launcher, str(HERE / "train.py"), *tiny_flags(*args)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(params=[(signal.SIGKILL, "flora"), (signal.SIGINT, "lora")],
                ids=["kill", "interrupt"])
def ending(request):
    """How a training ends too early, and the kind of its adapter."""
    return request.param


def test_an_interrupted_run_says_how_to_go_on_with_resume_once(
        tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "interrupts", lambda: contextlib.nullcontext(torch.ones(1)))
    for step, flags in [(1, []), (2, ["--resume"])]:
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        with pytest.raises(KeyboardInterrupt):
            run_train(tiny_folder, tmp_path, *flags)
        told = f"interrupted at step {step}; go on with: {sys.executable} train.py --resume\n"
        assert told in capsys.readouterr().out


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
    sentence = ("loss is (nan|inf) at step 2[12]; "
                "the last good checkpoint is kept in .*checkpoint.pt; lower --lr")
    assert re.search(sentence, capsys.readouterr().err)
    checkpoint = train.load_checkpoint(tmp_path / "checkpoint.pt")
    assert checkpoint["step"] == 20
    assert all(t.isfinite().all() for t in checkpoint["trained"].values())


def test_data_is_deduplicated_and_whole_files_are_held_out(tmp_path):
    folder = tmp_path / "code"
    (folder / ".git").mkdir(parents=True)
    body = ("int {0}_add(int a) {{\n  return a + 1;\n}}\n"
            "int {0}_sub(int a) {{\n  return a - 2;\n}}\n")
    for name in ("one", "two", "three"):                        # generated: a name differs
        (folder / f"{name}.h").write_text(body.format(name))
    for i in range(40):
        lines = [f"word{i} " * (1 + (i * j) % 7) + ";\n" for j in range(12)]
        (folder / f"f{i}.h").write_text("".join(lines))
    (folder / "binary.h").write_bytes(b"\x00\x01\xff")
    (folder / "latin1.h").write_bytes("é".encode("latin-1"))
    (folder / "empty.h").write_text("")
    (folder / "notes.txt").write_text("not code")
    (folder / ".git" / "hidden.h").write_text("hidden")
    files = train.find_files([str(folder)], [".h"])
    assert len(files) == 46 and files == sorted(files)
    assert files == train.find_files([str(folder / "*.h")])
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


def test_generate_reads_files_and_standard_input_and_stops_where_told(
        tiny_folder, tmp_path, monkeypatch, capsys):
    import io
    (tmp_path / "p.txt").write_text("def f")
    monkeypatch.setattr(sys, "stdin", io.StringIO("class A"))
    common = ["generate.py", "--weights", tiny_folder, "--json", tmp_path / "o.json",
              "--max-new-tokens", 12]
    files = ["--prompt-file", tmp_path / "p.txt", "--prompt-file", "-"]
    run_script(generate.main, [*common, *files], monkeypatch)
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
    # longer than what comes first: nothing is shown too early, and again
    run_script(generate.main, [*common, "--prompt", "def f", "--stop", "never" * 3], monkeypatch)
    assert capsys.readouterr().out == "def f" + rows[0]["text"] + "\n"


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
    assert shares(temperature=0.0)[0] == 1 and shares(top_p=1e-6)[0] == 1
    model, prompts = tiny_model(), [[5], [7, 8, 9], [1, 2]]
    settings = dict(max_new_tokens=20, temperature=1.0, top_k=50)
    together = generate.generate(model, prompts, seed=3, **settings)
    assert together[0] == generate.generate(model, prompts[:1], seed=3, **settings)[0]
    third = generate.generate(model, prompts[2:], seed=5, **settings)   # row 2 of seed 3
    assert together[2] == third[0]
    assert together != generate.generate(model, prompts, seed=4, **settings)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("script,flags,sentence", [
    ("train", "--rank 0", "--rank is 0; use a whole number of at least 1"),
    ("train", "--data {empty}", "--data holds 0 distinct readable text files"),
    ("train", "--data {empty}/none*.h", "none*.h: no such file, folder or glob match"),
    ("train", "--targets wq", "unknown target 'wq'; use one of c_attn, c_attn.qk"),
    ("train", "--block-size 65", "--block-size 65 is more than the model's context of 64"),
    ("train", "--weights {empty}", "config.json: no such file"),
    ("train", "--data {short} --block-size 64",
     "tokens, fewer than --block-size 64; give more files"),
    ("train", "--device tpu", "--device tpu: not usable here"),
    ("train", "--out {short}/a.h", "a.h: cannot be made a folder"),
    ("train", "--steps -1", "--steps is -1; use a whole number of at least 0"),
    ("generate", "", "no prompt; give --prompt TEXT or --prompt-file FILE"),
    ("generate", "--prompt a --prompt b --adapter x --adapter y --adapter z",
     "3 --adapter for 2 prompts"),
    ("generate", "--prompt a --adapter {empty}/x", "x: no such adapter file"),
    ("generate", "--prompt a --adapter {flora1}", "was trained on another base model"),
    ("generate", "--prompt a --suffix b", "has no fill-in-the-middle tokens"),
    ("generate", "--prompt {long}",
     "tokens, more than the model's context of 64 (n_positions); shorten it"),
    ("generate", "--prompt-file {empty}/x", "not readable as UTF-8 text"),
    ("generate", "--prompt a --temperature -1", "--temperature and --top-k must be at least 0"),
    ("generate", "--prompt a --json {empty}/no/x.json", "x.json: cannot be written"),
    ("generate", "--prompt a --json {empty}", "empty: is a folder; name a file"),
    ("generate", "--prompt a --json {short}/a.h", "a.h: holds something else than this writes"),
    ("generate", "--prompt a --stop=", "--stop is empty"),
    ("generate", "--prompt a --seed 99999999999999999999", "seed is 99999999999999999999"),
    ("generate", "--prompt caf\udce9", "is not Unicode"),
    ("train", "--json {short}/a.h", "a.h: holds something else than this writes"),
    ("train", "--plot {short}/log.json --out {short}/a.h",
     "a.h: holds something else than this writes"),
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
    last = printed.err.splitlines()[-1]
    assert sentence in last and f"{script}.py: error: " in last


def test_truncation_keeps_the_end_of_a_prompt_and_a_bos():
    ids = [1, 5, 6, 7]
    with_bos = [generate.truncate(ids, room, 1) for room in (9, 4, 3, 2, 1, -3)]
    assert with_bos == [ids, ids, [1, 6, 7], [1, 7], [7], [7]]
    assert [generate.truncate(ids, room, None) for room in (4, 3, 1)] == [ids, [5, 6, 7], [7]]


def test_a_prompt_that_does_not_fit_is_truncated_only_when_asked(
        tiny_folder, tmp_path, monkeypatch):
    model, tokenizer = GPT.from_pretrained(tiny_folder), Tokenizer(tiny_folder)
    text = "x," * 40 + "y"
    argv = ["generate.py", "--weights", tiny_folder, "--prompt", text, "--truncate",
            "--max-new-tokens", 4, "--json", tmp_path / "o.json"]
    run_script(generate.main, argv, monkeypatch)
    alone = generate.generate(model, [tokenizer.encode(text)[-60:]], max_new_tokens=4)
    assert json.loads((tmp_path / "o.json").read_text())[0]["tokens"] == alone[0]


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


def served_copy(model):
    """A model of the same weights and FLoRA adapter (rank 2) that has never generated."""
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
    """1,000 requests, 1 in 20 of them poisoned, in every slot and beside every other."""
    model = served_model([(kind, 2, None), ("flora", 1, None), ("lora", 2, None)], family).to(dtype)
    for name, p in model.named_parameters():
        p.data = p.data.float() if ".adapters." in name else p.data
    healthy = [(prompt, settings | dict(adapter_id=(0, 2, 3)[i % 3], temperature=0.0))
               for i, (prompt, settings) in enumerate(served_requests(20, 3))]
    alone = []
    for prompt, settings in healthy:
        engine = engine_class(model, slots=1)
        request = engine.submit(prompt, **settings)
        engine.run()
        alone.append(request.ids)
    poison(model, 1, values)
    engine, requests = engine_class(model, slots=8), []
    for i in range(1000):
        prompt, settings = healthy[i % 20]
        if i % 20 == 7:
            settings = settings | dict(adapter_id=1)
        requests.append(engine.submit(prompt, **settings))
    engine.run()
    for i, request in enumerate(requests):
        if request.adapter_id == 1:
            assert request.state == "failed" and "its logits are not finite" in request.error
        else:
            assert request.state == "done" and request.error is None
            assert request.ids == alone[i % 20]


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


def test_a_setting_out_of_range_fails_alone(model):
    engine, bad = Engine(model, slots=2), []
    before = engine.submit([1, 2])
    for setting, value in [
            ("max_new_tokens", 0), ("seed", 10**20), ("seed", -1), ("top_k", 10**20), ("top_k", -1),
            ("temperature", 10**400), ("temperature", float("nan")), ("temperature", float("inf")),
            ("top_p", 0.0), ("top_p", float("nan"))]:
        bad.append((setting, engine.submit([1, 2], **{setting: value})))
    after = engine.submit([3], temperature=1.0)
    engine.run()
    for setting, request in bad:
        assert request.state == "failed" and setting in request.error and request.ids == []
        assert len(request.error) < 200
    assert before.state == after.state == "done" and len(after.ids) == 63


def test_generate_equals_the_plain_loop(model, expected):
    requests, _ = expected
    prompts, adapter_ids = [p for p, _ in requests[:9]], [s["adapter_id"] for _, s in requests[:9]]
    settings = dict(max_new_tokens=7, temperature=0.7, top_k=30, top_p=0.9)
    got = generate.generate(model, prompts, adapter_ids, seed=3, **settings)
    assert got == [plain(model, p, a, seed=3 + row, **settings)
                   for row, (p, a) in enumerate(zip(prompts, adapter_ids))]


def test_a_model_may_be_trained_changed_and_copied_between_generations(family):
    """Packed copies of the weights (extras/packed.py) follow them; a gradient never meets one."""
    model, prompt = served_model([("flora", 2, None)], family), [3, 1, 4]
    for _ in range(2):
        expected = plain(served_copy(model), prompt, 1, max_new_tokens=8)
        assert generate.generate(model, [prompt], [1], max_new_tokens=8) == [expected]
        copied = copy.deepcopy(model)
        assert generate.generate(copied, [prompt], [1], max_new_tokens=8) == [expected]
        with torch.no_grad():
            next(iter(dict(flora.adapter_layers(model)).values())).weight.mul_(-1)
            model.wte.weight.add_(torch.randn(97, 64))
            if family == "llama":
                model.lm_head.weight.add_(torch.randn(97, 64))
    model(torch.tensor([prompt]), torch.tensor([1])).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in flora.adapter_parameters(model, 1).values())


# ------------------------------------------------------------------- outputs, locks and identity


def test_an_output_is_written_in_one_piece_or_as_it_stands(tmp_path, capfd):
    file, link, pipe = tmp_path / "a.json", tmp_path / "link.json", tmp_path / "pipe"
    flora.write_json(file, {"a": 1})
    file.chmod(0o604)
    link.symlink_to(file)
    flora.write_json(link, {"b": 2})
    assert link.is_symlink() and json.loads(file.read_text()) == {"b": 2}
    assert file.stat().st_mode & 0o777 == 0o604
    for device in ("/dev/null", "/dev/stdout"):
        before = os.stat(device).st_ino, os.stat(device).st_mode
        flora.write_json(device, {"c": 3})
        flora.save_tensors({"a": torch.ones(3)}, "/dev/null", {})
        assert (os.stat(device).st_ino, os.stat(device).st_mode) == before
    assert json.loads(capfd.readouterr().out) == {"c": 3}
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    flora.write_json(pipe, {"d": 4})
    assert json.loads(reader.communicate()[0]) == {"d": 4} and pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "link.json", "pipe"]


def test_what_cannot_be_written_in_full_leaves_what_was_there(tmp_path):
    """A limit on the size of files stands for a full disk."""
    tensors = {"a": torch.ones(10_000)}
    file, hard = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    writes = [lambda: flora.save_tensors(tensors, file, {}),
              lambda: flora.write_json(file, ["a" * 10_000])]

    def save():
        with flora.open_output(file) as f:
            torch.save(tensors, f)

    for write in [*writes, save]:
        file.write_text("{} before")
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        try:
            with pytest.raises(BadInput, match="file: cannot be written .*File too large"):
                write()
            check_writable(str(file), "--json", JSON)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert file.read_text() == "{} before" and os.listdir(tmp_path) == ["file"]
        write()
    with pytest.raises(BadInput, match="/dev/full: cannot be written .No space left"):
        flora.write_json("/dev/full", {})


def test_outputs_are_checked_before_the_work(tmp_path):
    (tmp_path / "text").write_text("mine")
    (tmp_path / "old.json").write_text("[1]")
    for name, kind, sentence in [
            ("", None, "is a folder"),
            ("no/x.json", None, "No such file"),
            ("no/", None, "is a folder"),
            ("text/x.json", None, "Not a directory"),
            ("a" * 300, None, "File name too long"),
            ("text", JSON, "holds something else"),
            ("old.json", PNG, "holds something else")]:
        with pytest.raises(BadInput, match=f"--json .*{sentence}"):
            check_writable(os.path.join(tmp_path, name), "--json", kind)
    check_writable(str(tmp_path / "old.json"), "--json", JSON)
    check_writable(str(tmp_path / "new" / "x.png"), "--png", PNG, make_folder=True)
    assert sorted(os.listdir(tmp_path)) == ["new", "old.json", "text"]
    assert not os.listdir(tmp_path / "new")
    calls = []

    def broken():
        calls.append(1)
        raise BadInput("one cannot be written")

    with pytest.raises(BadInput, match="one cannot be written; one cannot be written"):
        write_each(broken, lambda: calls.append(2), broken)
    assert calls == [1, 2, 1]


def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path):
    holder = ("import sys, time, model\n"
              "with model.locked(sys.argv[1], '--out'):\n"
              "    print(1, flush=True)\n"
              "    time.sleep(99)\n")
    for path in (tmp_path, tmp_path / "file"):
        command = [sys.executable, "-c", holder, path]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=HERE)
        process.stdout.readline()
        with pytest.raises(BadInput, match="another process is writing there"):
            with locked(path, "--out"):
                pass
        process.kill()
        process.wait()
        with locked(path, "--out"):
            pass
    assert os.listdir(tmp_path) == []


def test_a_second_start_is_refused_and_a_full_disk_keeps_the_last_good_checkpoint(
        tiny_folder, tmp_path):
    flags, checkpoint = ["--steps", 150], tmp_path / "cut" / "checkpoint.pt"
    process = start_train(tiny_folder, tmp_path / "cut", *flags)
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(BadInput, match="--out .*cut: another process is writing there"):
        run_train(tiny_folder, tmp_path / "cut", *flags, "--resume")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    process.send_signal(signal.SIGCONT)
    printed = process.communicate()[0]
    assert process.returncode == 2 and "Traceback" not in printed, printed
    assert "cannot be written (File too large)" in printed
    assert "the last good checkpoint is kept in" in printed
    assert train.load_checkpoint(checkpoint)["step"] >= 10
    resumed = run_train(tiny_folder, tmp_path / "cut", *flags, "--resume")
    uncut = run_train(tiny_folder, tmp_path / "uncut", *flags)
    assert [p["heldout_loss"] for p in resumed["log"]] == [p["heldout_loss"] for p in uncut["log"]]
    assert not list(tmp_path.rglob("*.tmp"))


def test_resume_tells_bases_and_data_apart_by_their_contents(
        tiny_folder, tmp_path, monkeypatch, capsys):
    data, other = tmp_path / "data", tmp_path / "other"
    data.mkdir()
    for i, file in enumerate(sorted(Path(HEADERS).parent.glob("*.h"))[:12]):
        shutil.copy(file, data / f"{i}.h")
    shutil.copytree(tiny_folder, other)
    tensors = load_file(other / "model.safetensors")
    next(iter(tensors.values())).view(-1)[1] += 1   # one weight of the base
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    flags = [tiny_folder, tmp_path / "out", "--steps", 4, "--adapter", "lora"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "over_processes", lambda loss, asked: (loss.item(), True))
        run_train(*flags, "--data", data)
    shutil.copytree(data, tmp_path / "moved")
    (data / "0.h").write_text("int changed;\n" * 50)
    moved = [*flags, "--data", tmp_path / "moved", "--resume"]
    for more, sentence in [
            (["--data", data], "made with other data"),
            (["--weights", other], "made with another base model"),
            (["--eval-tokens", 99], "made with --eval-tokens 500, not 99"),
            (["--clip", 2], ".*--clip 1.0, not 2.0"),
            (["--dtype", "bfloat16"], "made with --dtype float32, not bfloat16"),
            (["--lr", 1], "made with --lr 0.001, not 1.0")]:
        with pytest.raises(BadInput, match=f"checkpoint.pt was {sentence}"):
            run_train(*moved, *more)
    file = tmp_path / "out" / "checkpoint.pt"
    checkpoint = train.load_checkpoint(file)
    assert run_train(*moved)["log"][-1]["step"] == 4
    # as earlier versions wrote it
    for name in ("base", "data", "lora", "clip", "dtype", "eval_tokens"):
        del checkpoint["args"][name]
    checkpoint["args"]["data"] = [str(tmp_path / "moved")]
    torch.save(checkpoint, file)
    capsys.readouterr()
    assert run_train(*moved)["log"][-1]["step"] == 4
    assert "is not checked" in capsys.readouterr().out


def test_a_prompt_that_cannot_be_run_fails_alone(tiny_folder, tmp_path, monkeypatch, capsys):
    argv = ["generate.py", "--weights", tiny_folder, "--max-new-tokens", 3,
            "--json", tmp_path / "o.json"]
    for prompt in ("int a", "caf\udce9", "x," * 40, "int b"):
        argv += ["--prompt", prompt]
    with pytest.raises(SystemExit) as exit:
        run_script(generate.main, argv, monkeypatch)
    printed, rows = capsys.readouterr(), json.loads((tmp_path / "o.json").read_text())
    assert exit.value.code == 2 and "[1] int a" in printed.out and "[4] int b" in printed.out
    assert "prompt 2: a text holds half of a surrogate pair" in printed.err
    assert "prompt 3: a prompt has" in printed.err
    assert [row["error"] is None for row in rows] == [True, False, False, True]
    model, tokenizer = GPT.from_pretrained(tiny_folder), Tokenizer(tiny_folder)
    alone = generate.generate(model, [tokenizer.encode("int b")], max_new_tokens=3)
    assert rows[3]["tokens"] == alone[0] and rows[1]["tokens"] == rows[2]["tokens"] == []


# ------------------------------------------------------------------------------------ command lines


def script(name, *args, cwd=None):
    command = [sys.executable, os.path.join(HERE, name), *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def write_jsonl(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


ROW_KEYS = {"method", "baseline", "rank", "mode", "request_rate", "tokens_per_second",
            "ratio_to_base", "seconds_per_output_token_mean", "seconds_per_output_token_p50",
            "seconds_per_output_token_p99", "time_to_first_token_mean", "time_to_first_token_p99"}


@pytest.fixture(scope="module")
def served_folder(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    served_model([], family).save_pretrained(folder)
    return folder


def test_bench_writes_table_json_and_figure(served_folder, tmp_path):
    run = script("bench.py", "--weights", served_folder, "--ranks", 1, 2, "--num-requests", 5,
                 "--scale", 0.02, "--repeats", 1, "--slots", 2, "--num-adapters", 3,
                 "--request-rate", 500, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "out" / "bench_cpu.json").read_text())
    # two modes; base and ia3; FLoRA and two LoRAs at two ranks
    assert len(result["rows"]) == 2 * (2 + 2 * 3)
    assert {row["baseline"] for row in result["rows"]} == {
        "base", "ia3", "flora", "lora-example", "lora-token"}
    check_bench_result(result, run.stdout, tmp_path)


def check_bench_result(result, printed, folder):
    """What holds for every run of modes throughput and latency with a request rate of 500."""
    assert result.keys() >= {"machine", "model", "dtype", "workload", "limits", "rows", "eq7",
                             "free_rank"}
    served = [row for row in result["rows"] if row["mode"] != "layer"]
    assert all(row.keys() >= ROW_KEYS for row in served)
    assert {row["request_rate"] for row in served if row["mode"] == "latency"} == {500}
    assert all(row["ratio_to_base"] == 1 for row in served if row["method"] == "base")
    assert result["eq7"]["predicted"]["c1"] > 0 and "predicted inflection rank" in printed
    assert (folder / "figures" / "fig2_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("*.tmp"))
    for row in served:
        assert f"{row['tokens_per_second']:.1f}" in printed
    free, limits = result["free_rank"], result["limits"]
    balance = limits["matmul_gflop_s"] / limits["bandwidth_gb_s"] * 4 / 2   # float32
    assert free["balance"] == pytest.approx(balance)
    assert free["predicted"] == pytest.approx(balance / free["requests"])
    throughput = [row for row in served if row["mode"] == "throughput"]
    assert free["measured"]["flora"] == [
        row["rank"] for row in throughput
        if row["baseline"] == "flora" and row["ratio_to_base"] >= 0.97]
    assert f"free rank: {balance:.1f} rows" in printed


def test_bench_prints_and_draws_what_it_measured_when_the_results_cannot_be_written(
        served_folder, tmp_path):
    figure = tmp_path / "new" / "b.png"
    common = ["--weights", served_folder, "--ranks", 1, "--num-requests", 2, "--scale", 0.02,
              "--repeats", 1, "--slots", 2, "--num-adapters", 1, "--mode", "throughput",
              "--rows", "flora"]
    run = script("bench.py", *common, "--json", "/dev/full", "--png", figure)
    assert run.returncode == 2 and "/dev/full: cannot be written (No space left" in run.stderr
    assert "tokens/s" in run.stdout and figure.read_bytes().startswith(b"\x89PNG")
    for flag in ("--json", "--png"):
        run = script("bench.py", *common, flag, tmp_path, cwd=tmp_path)
        assert run.returncode == 2 and not run.stdout
        assert f"{flag} {tmp_path}: is a folder" in run.stderr


def test_bench_refuses_what_it_cannot_run_in_a_sentence(served_folder, tmp_path, monkeypatch):
    for flags, sentence in [
            (["--ranks", "0"], "--ranks is 0; use a whole number of at least 1"),
            (["--num-adapters", "0"], "--num-adapters is 0"),
            (["--request-rate", "-1"], "--request-rate is -1.0; use a number above 0"),
            (["--model", "starcoder"], "--model needs --random-weights"),
            (["--random-weights"], "--model needs"),
            (["--model", "starcodr", "--random-weights"],
             "--model starcodr: unknown; use one of tiny_starcoder_py"),
            (["--rows", "lore"], "--rows lore"),
            (["--scale", "1"],
             "--scale 1.0: the longest request has .* more than the model's context of 64; use"),
            (["--weights", tmp_path / "nowhere"], "nowhere: no such model folder")]:
        argv = ["bench.py", "--weights", served_folder, *flags]
        monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
        with pytest.raises(BadInput, match=sentence):
            bench.main()


def test_bench_lengths_follow_the_paper_and_the_seed():
    lengths = bench.synthetic_lengths(4000, 0)
    assert all(50 <= p + n <= 2000 for p, n in lengths)
    assert abs(sum(p for p, _ in lengths) / 4000 - 161) < 10
    assert abs(sum(n for _, n in lengths) / 4000 - 338) < 15
    assert lengths[:100] == bench.synthetic_lengths(100, 0) != bench.synthetic_lengths(100, 1)


def test_bench_does_not_time_variants_that_disagree(family):
    fresh = served_model([], family)
    sets = bench.make_adapter_sets(fresh, [("lora", 2), ("flora", 2), ("ia3", 0.5)], 2)
    bench.check_agreement(fresh, sets, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flora, "lora_per_token", lambda x, rows: 0)
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


def test_a_reader_that_goes_away_ends_a_script_without_a_traceback():
    lines = "from model import run_main; run_main(lambda: [print('x' * 99) for _ in range(9999)])"
    script = subprocess.Popen([sys.executable, "-c", lines], cwd=HERE, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    script.stdout.readline()
    script.stdout.close()
    assert script.stderr.read() == "" and script.wait() == 141
