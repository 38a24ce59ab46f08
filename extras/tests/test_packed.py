"""extras/packed.py: packed weights compute what plain ones do, in the dtypes that this processor has."""
import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import flora
import generate
from extras import packed
from model import ACTIVATIONS, GPT, attend
from test_flora import CONFIGS, SERVED, plain, run_script, served_model


@pytest.mark.parametrize("family", ["gpt_bigcode", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_as_near_to_float64_as_plain_ones(family, dtype):
    """Logits of a mixed batch, for prompts and for single tokens."""
    plain = served_model(SERVED[family], family).to(dtype)
    exact, served = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    flora.freeze_bank(plain), flora.freeze_bank(served)
    served.pack()
    ids, adapter_ids = torch.randint(0, 97, (7, 9)), torch.arange(7)
    native = dtype == torch.float32 or packed.computes_bfloat16()
    assert isinstance(served.times_output, packed.PackedLinear) == native
    with torch.inference_mode():
        for ids in (ids, ids[:, :1]):
            expected = exact(ids, adapter_ids)
            errors = [(model(ids, adapter_ids).double() - expected).norm() for model in (plain, served)]
            assert errors[1] < 1.5 * errors[0]


class Counted(TorchDispatchMode):
    """Counts calls of GELU as an operator of its own."""
    gelus = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.gelus += func is torch.ops.aten.gelu.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_gelu_rides_on_its_product_where_no_adapter_comes_between(activation):
    config = replace(CONFIGS["gpt_bigcode"], activation_function=activation)
    for target, own in [("c_attn", 0), ("c_fc", config.n_layer)]:
        torch.manual_seed(0)
        served = GPT(config).requires_grad_(False)
        for p in served.parameters():   # such that the two GELUs can be told apart
            if p.dim() == 2:
                nn.init.normal_(p, std=p.shape[1]**-0.5)
        flora.add_adapter(served, "flora", 2, [target])
        for p in flora.adapter_parameters(served, 1).values():
            p.data += 0.3 * torch.randn_like(p)
        ids, adapter_ids = torch.randint(0, config.vocab_size, (3, 5)), torch.tensor([0, 1, 1])
        with torch.no_grad():
            expected = served(ids, adapter_ids)
            served.pack()
            with Counted() as counted:
                found = served(ids, adapter_ids)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        assert counted.gelus == own
    other = {"gelu": "gelu_pytorch_tanh", "gelu_pytorch_tanh": "gelu"}[activation]
    for block in served.blocks:   # the bound sees one in the place of the other
        block.mlp.activation = ACTIVATIONS[other]
    with torch.no_grad():
        swapped = served(ids, adapter_ids)
    assert (swapped - expected).abs().max() > 1e-5 * expected.abs().max()


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_attends_to_a_cache_as_a_plain_one(key_heads, dtype):
    """One token a row, each row with as much of the cache in sight as it has filled."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, n, 8, dtype=dtype)
               for heads, n in [(4, 1), (key_heads, 7), (key_heads, 7)])
    unseen = torch.arange(7) > torch.tensor([0, 3, 6])[:, None, None, None]   # [3, 1, 1, 7]
    mask = torch.zeros(3, 1, 1, 7, dtype=dtype).masked_fill(unseen, float("-inf"))
    exact = attend(q.double(), k.double(), v.double(), mask.double())
    ours = packed.attend_to_cache(q, k, v, mask)
    assert (ours - exact).abs().max() < (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_packing_leaves_attention_by_plain_math_as_it_is(tiny_folder):
    for flash in (False, True):
        model = GPT.from_pretrained(tiny_folder)
        model.set_attention(flash)
        model.pack()
        packs = [attention.attend is packed.attend_to_cache for attention in model.attentions()]
        assert packs == [flash] * model.config.n_layer


@pytest.mark.parametrize("native, chosen", [(True, "bfloat16"), (False, "float32")])
def test_dtype_auto_takes_what_the_processor_computes_in(native, chosen, monkeypatch):
    monkeypatch.setattr(packed, "computes_bfloat16", lambda: native)
    dtype, why = packed.choose_dtype(torch.device("cpu"))
    assert dtype == chosen and "as this processor" in why


def test_dtype_auto_serves_in_what_it_says(tiny_folder, monkeypatch, capsys):
    chosen, why = packed.choose_dtype(torch.device("cpu"))
    run_script(generate.main, ["generate.py", "--weights", str(tiny_folder), "--device", "cpu", "--dtype", "auto",
                               "--prompt", "a", "--max-new-tokens", "2"], monkeypatch)
    err = capsys.readouterr().err
    assert f"--dtype auto: {chosen}, {why}" in err and f"{chosen} on cpu" in err
    args = bench.parse_args(["--weights", str(tiny_folder), "--device", "cpu", "--dtype", "auto"])
    assert bench.load_model(args).wte.weight.dtype == getattr(torch, chosen) and args.dtype == chosen


def served_copy(model):
    """A model of the same weights and FLoRA adapter (rank 2) that has never generated."""
    fresh = served_model([("flora", 2, None)], model.config.model_type)
    fresh.load_state_dict(model.state_dict())
    return fresh


@pytest.mark.parametrize("family", ["gpt_bigcode", "llama"])
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
