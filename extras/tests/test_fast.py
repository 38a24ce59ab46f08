"""train.py --fast: the losses and gradients of the plain path, by other means."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import flora
import model as plain
import train
from extras import fast, table1
from extras.tests.conftest import PACKED
from plumbing.files import BadInput
from test_flora import random_adapter, run_train, tiny_model


def loss_and_gradients(model, parameters, loss, dtype):
    ids = torch.arange(160).view(4, 40)
    with train.autocast(torch.device("cpu"), dtype):
        value = loss(model, ids * 3 % 256, ids * 5 % 256, torch.tensor([1, 1, 1, 1]))
    value.backward()
    gradients = torch.cat([p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return value.item(), gradients


@pytest.mark.parametrize("kind, rank", [("flora", 1), ("flora", 4), ("lora", 2), ("ia3", 1), ("hira", 2)])
@pytest.mark.parametrize("family", ["gpt_bigcode", "llama"])
@pytest.mark.parametrize("dtype", PACKED)
def test_losses_and_gradients_are_those_of_the_plain_path(
        family, kind, rank, dtype, monkeypatch):
    """bfloat16: as near to float32's as the plain path is."""
    monkeypatch.setattr(fast, "ROWS", 50)
    monkeypatch.setattr(fast, "QUERIES", 16)
    model = tiny_model(family).requires_grad_(False)
    adapter_id = random_adapter(model, kind, rank)
    parameters = list(flora.adapter_parameters(model, adapter_id).values())
    exact, gradients = loss_and_gradients(model, parameters, train.loss_of, "float32")
    before, about = loss_and_gradients(model, parameters, train.loss_of, dtype)
    loss = fast.speed_up(model, SimpleNamespace(compile=False, dtype=dtype))
    after, ours = loss_and_gradients(model, parameters, loss, dtype)
    if dtype == "float32":
        assert after == pytest.approx(exact, abs=1e-5)
        torch.testing.assert_close(ours, gradients, rtol=1e-4, atol=1e-5)
    else:
        assert abs(after - exact) < 2 * abs(before - exact) + 2e-3
        assert (ours - gradients).norm() < 1.5 * (about - gradients).norm()


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 5, 13])
def test_attention_in_blocks_equals_attend_and_so_do_its_gradients(key_heads, tokens, monkeypatch):
    monkeypatch.setattr(fast, "QUERIES", 5)
    torch.manual_seed(0)
    q, g = torch.randn(2, 2, 4, tokens, 3, dtype=torch.float64)
    k, v = torch.randn(2, 2, key_heads, tokens, 3, dtype=torch.float64)
    for x in (q, k, v):
        x.requires_grad_()
    expected, ours = plain.attend(q, k, v), fast.CausalAttention.apply(q, k, v)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, (q, k, v), g),
                               torch.autograd.grad(expected, (q, k, v), g))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_gelu_by_a_sigmoid_is_torchs_by_tanh_and_so_is_its_slope(dtype, tolerance, monkeypatch):
    """A row at a time, far out too, where the slope is 0 or 1."""
    monkeypatch.setattr(fast, "ROWS", 1)
    x = torch.cat([torch.linspace(-6, 6, 98), torch.tensor([-100.0, 100.0])]).view(4, 25)
    x = x.to(dtype).requires_grad_()
    expected, ours = F.gelu(x, approximate="tanh"), fast.gelu(x)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, expected)),
                               rtol=tolerance, atol=tolerance)


def test_the_loss_in_parts_equals_cross_entropy_and_so_do_its_gradients(monkeypatch):
    monkeypatch.setattr(fast, "ROWS", 4)
    torch.manual_seed(0)
    x, E = torch.randn(10, 6, requires_grad=True), torch.randn(30, 6, requires_grad=True)
    targets = torch.tensor([3, -100, 29, 0, 5, 5, -100, 8, 1, 2])
    expected = F.cross_entropy(x @ E.T, targets)
    ours = fast.OutputLoss.apply(x, E, targets, torch.float32, fast.both_ways(E, torch.float32))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * ours, (x, E)),
                               torch.autograd.grad(3 * expected, (x, E)))


@pytest.mark.parametrize("kind", ["flora", "none"])
def test_a_fast_training_has_the_losses_of_a_plain_one(kind, tiny_folder, tmp_path):
    reports = [run_train(tiny_folder, tmp_path / f"{len(flags)}", "--adapter", kind, *flags)
               for flags in ([], ["--fast"])]
    for a, b in zip(*(report["log"] for report in reports)):
        assert a["heldout_loss"] == pytest.approx(b["heldout_loss"], abs=1e-4)


def test_what_fast_is_not_for_is_refused(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="--fast is for one process on a CPU, without --compile"):
        fast.speed_up(tiny_model(), SimpleNamespace(compile=True, dtype="float32"))
    monkeypatch.setattr(fast, "packs_bfloat16", lambda: False)
    with pytest.raises(BadInput, match="no AVX-512; use --dtype float32"):
        fast.speed_up(tiny_model(), SimpleNamespace(compile=False, dtype="bfloat16"))
    args = table1.parse_args(["--device", "cpu", "--dtype", "bfloat16", "--out", str(tmp_path)])
    with pytest.raises(BadInput, match="no AVX-512; use --dtype float32"), table1.outputs(args):
        pass
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "--fast" not in table1.size_flags(args)
    with pytest.raises(BadInput, match="oneDNN, which this PyTorch lacks; leave it out"):
        fast.speed_up(tiny_model(), SimpleNamespace(compile=False, dtype="float32"))
