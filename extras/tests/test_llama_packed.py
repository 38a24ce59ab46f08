"""extras/llama_packed.py: a decoding step in fewer operators computes what extras/llama.py does."""
import copy
from dataclasses import replace

import pytest
import torch

import bench
import flora
from extras import llama_packed, packed
from extras.int8 import quantize_int8
from extras.joint import Joint
from extras.llama import Llama
from extras.tests.conftest import PACKED
from model import model_from_config
from test_flora import CONFIGS, SERVED, trained

SHAPES = {
    "grouped": {},   # key heads for two queries each, Llama 3's RoPE
    "one": dict(n_kv_head=1, head_dim=32, rope_scaling=None),
    "each": dict(n_kv_head=4)}
ADAPTERS = {
    "base": [], "flora": [("flora", 1, None)] * 3, "lora": [("lora", 1, None)] * 3,
    "mlp": [("flora", 2, ["gate_proj", "down_proj"])],
    "mixed": SERVED["llama"] + [("ffba", 2, None)]}


def llama(kinds=(), **shape):
    torch.manual_seed(0)
    config = replace(CONFIGS["llama"], vocab_size=97, n_positions=64, n_embd=64, n_inner=128)
    model = model_from_config(replace(config, **shape)).requires_grad_(False)
    for p in model.parameters():   # such that attention and the norms matter
        torch.nn.init.normal_(p, mean=p.dim() == 1, std=p.shape[-1]**-0.5)
    for kind, rank, targets in kinds:
        trained(model, flora.add_adapter(model, kind, rank, targets))
    flora.freeze_bank(model)
    return model


@pytest.fixture
def native(monkeypatch):
    """As on a processor that computes in bfloat16."""
    monkeypatch.setattr(packed, "computes_bfloat16", packed.packs_bfloat16)


@pytest.fixture
def calls(monkeypatch):
    """How often each function of a step is called."""
    counts = {}

    def count(name):
        function = getattr(llama_packed, name)

        def counted(*args):
            counts[name] = counts.get(name, 0) + 1
            return function(*args)
        monkeypatch.setattr(llama_packed, name, counted)
    for name in ("norm", "attend_by_products"):
        count(name)
    return counts


@torch.no_grad()
def logits(model, batch, adapters, steps=5):
    """Of prompts of several lengths and of the steps after them -> [steps + 1, B, vocab]."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 97, (batch, 9 + steps), generator=generator)
    ends = torch.randint(1, 10, (batch, 1), generator=generator)
    adapter_ids = torch.arange(batch) % (adapters + 1) if adapters else None
    cache = model.new_kv_cache(batch + 1, 20)[:, :, :batch, :, :17]   # a part of a larger one
    prompts = model(ids[:, :9], adapter_ids, cache[:, :, :, :, :9])
    found = [prompts[torch.arange(batch), ends[:, 0] - 1]]
    gathered = flora.gather(model, adapter_ids)
    for i in range(steps):
        found.append(model(ids[:, 9 + i:10 + i], gathered, cache, ends + i)[:, 0])
    return torch.stack(found)


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("kinds", ADAPTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_and_prompts_are_those_of_the_plain_path(shape, kinds, batch, dtype, native, calls):
    dtype = getattr(torch, dtype)
    plain = llama(ADAPTERS[kinds], **SHAPES[shape])
    exact = logits(copy.deepcopy(plain).double(), batch, len(ADAPTERS[kinds]))
    plain.to(dtype)
    served = copy.deepcopy(plain)
    served.pack()
    expected, found = (logits(model, batch, len(ADAPTERS[kinds])) for model in (plain, served))
    layers = plain.config.n_layer
    assert calls["norm"] == 5 * 2 * layers
    many = batch * plain.config.n_kv_head >= llama_packed.MANY_HEADS
    products = 5 * layers if dtype == torch.bfloat16 and many else 0
    assert calls.get("attend_by_products", 0) == products
    if dtype == torch.float32:   # beside what the plain path itself is off
        plain_error = (expected - exact).abs().amax(-1, keepdim=True)
        assert ((found - expected).abs() < 1e-5 * expected.abs().max() + 2 * plain_error).all()
    else:
        assert (found - exact).norm() < 1.3 * (expected - exact).norm()


@pytest.mark.parametrize("kind, rank, targets, joined", [
    ("flora", 1, None, True), ("flora", 2, None, False), ("ia3", 1, None, True),
    ("lora", 16, None, True), ("lora", 17, None, False), ("ffba", 1, None, False),
    ("lora", 1, ["gate_proj", "o_proj"], True), ("flora", 1, ["up_proj", "down_proj"], True)])
def test_adapters_of_a_low_rank_are_applied_to_several_layers_at_once(kind, rank, targets, joined):
    model = llama([(kind, rank, targets)] * 2 + [("lora", 1, targets)] * (kind != "ffba"))
    rows = torch.tensor([0, 2, 1, 3 % (model.blocks[0].self_attn.q_proj.num_adapters + 1)])
    cache, ids, positions = model.new_kv_cache(4, 8), rows[:, None] + 5, torch.zeros(4, 1).long()
    with torch.no_grad():
        expected = model(ids, rows, cache, positions)
        model.pack()
        for way in (bench.token, bench.example):   # the paper's LoRA too
            for _, layer in flora.adapter_layers(model):
                way(layer)
            for adapter_ids in (rows, rows[:, None], flora.gather(model, rows)):   # by token as well
                found = model(ids, adapter_ids, cache, positions)
                assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
            kept = [part for rows in adapter_ids.values() for key, part in rows.kept.items()
                    if isinstance(key, Joint)]
            assert kept and all((part is not None) == joined for part in kept)


@pytest.mark.parametrize("kind", ["flora", "lora"])
def test_a_layer_with_a_way_of_its_own_is_left_to_it(kind, monkeypatch):
    """FLoRA by Eq. 4, and LoRA by another function (bench.py)."""
    ways = []
    model = llama([(kind, 1, ["q_proj"])])
    model.pack()
    monkeypatch.setitem(flora.PATHS, "materialise", lambda layer, x, *_: ways.append(x) or
                        layer.product(x))
    if kind == "flora":
        flora.set_path(model, "materialise")
    for block in model.blocks if kind == "lora" else ():
        block.self_attn.q_proj.add_lora = lambda y, x, rows: ways.append(x) or y
    logits(model, 3, 1, steps=4)
    assert len(ways) == (1 + 4) * model.config.n_layer


def test_only_a_step_that_serves_is_taken(calls):
    """Not one with gradients, not two tokens at once, nor float16, which a CPU does not pack."""
    model = llama()
    model.pack()
    cache, ids = model.new_kv_cache(2, 8), torch.zeros(2, 2, dtype=torch.int64)
    positions = torch.arange(2).expand(2, 2)
    with torch.enable_grad():
        model(ids[:, :1], None, cache, positions[:, :1])
    with torch.no_grad():
        model(ids, None, cache, positions)
        model(ids, None, cache)
        assert "norm" not in calls
        model(ids[:, :1], None, cache, positions[:, :1])
    assert calls["norm"] == 2 * model.config.n_layer
    half = llama().to(torch.float16)
    half.pack()
    assert type(half) is Llama


def test_a_gradient_meets_no_packed_weight(calls):
    model = llama([("flora", 1, ["all"])])
    model.pack()
    for p in flora.adapter_parameters(model, 1).values():
        p.requires_grad_()
    for _, layer in flora.adapter_layers(model):
        layer.frozen_bank = None
    logits(model, 3, 1)
    calls.clear()
    model(torch.zeros(2, 3, dtype=torch.int64), None)
    model(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1])).sum().backward()
    assert not calls
    assert all(p.grad.abs().sum() > 0 for p in flora.adapter_parameters(model, 1).values())


@pytest.mark.parametrize(
    "name", ["q_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "input_layernorm"])
def test_what_is_packed_follows_a_weight_that_changes(name):
    model = llama()
    model.pack()
    before = logits(model, 3, 0)
    for replaced in (False, True):
        for module in [module for n, module in model.named_modules() if n.endswith(name)]:
            if replaced:
                module.weight = torch.nn.Parameter(torch.randn_like(module.weight))
            module.weight.requires_grad_(False).mul_(-0.5)
        fresh = llama()
        fresh.load_state_dict(model.state_dict())
        after = logits(fresh, 3, 0)
        for changed in (model, copy.deepcopy(model)):
            assert (logits(changed, 3, 0) - after).abs().max() < 1e-5 * after.abs().max()
        assert (after - before).abs().max() > 1e-2 * after.abs().max()


@pytest.mark.parametrize("dtype", PACKED)
def test_attention_by_plain_math_is_kept(dtype, native, calls):
    plain, served = (llama(n_kv_head=4).to(getattr(torch, dtype)) for _ in range(2))
    served.set_attention(flash=False)
    served.pack()
    expected, found = logits(plain, 9, 0), logits(served, 9, 0)
    assert (found - expected).norm() < (2e-2 if dtype == "bfloat16" else 1e-6) * expected.norm()
    assert calls["norm"] and "attend_by_products" not in calls


def test_an_int8_base_is_served_as_before():
    model = llama()
    quantize_int8(model)
    expected = logits(model, 9, 0)
    model.pack()
    assert (logits(model, 9, 0) - expected).abs().max() < 1e-5 * expected.abs().max()
