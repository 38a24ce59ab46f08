"""An 8-bit base: close to the full one, and exact where its own values are the reference."""
import copy

import pytest
import torch

import bench
import flora
import generate
import train
from extras import int8
from extras.int8 import DynamicLinear, Int8, Int8Dynamic, quantize_int8
from extras.tests.conftest import EXTRA_KINDS
from plumbing.files import BadInput
from test_flora import MIXED, SERVED, plain, random_adapter, run_script, run_train, served_model, tiny_model


def test_int8_base_is_close_and_adapters_run_on_it(family):
    kinds = SERVED[family] + [("ffba", 2, None)]
    model, exact = served_model(kinds, family), served_model(kinds, family)
    quantize_int8(model)
    ids, adapter_ids = torch.randint(0, 97, (8, 9)), torch.arange(8)
    with torch.no_grad():
        expected, layers = exact(ids, adapter_ids), [layer for _, layer in flora.adapter_layers(model)]
        assert (model(ids, adapter_ids) - expected).norm() < 0.03 * expected.norm()
        for layer, exact_layer in zip(layers, (layer for _, layer in flora.adapter_layers(exact))):
            exact_layer.weight.copy_(layer.W0().float().T)
        for path in ("expand", "materialise"):
            for layer in layers:
                layer.path = path
            torch.testing.assert_close(model(ids, adapter_ids), exact(ids, adapter_ids), atol=1e-4, rtol=1e-4)
    assert generate.generate(model, [[1, 2]], [3], max_new_tokens=6)[0] == plain(exact, [1, 2], 3, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [None, 63, DynamicLinear.LEVELS])
def test_int8_products_of_any_number_of_rows_equal_their_own_values(dtype, levels, monkeypatch):
    """Against float64: weight-only (None) within the dtype's own error; dynamic, with its input rounded
    to as many levels as it says, too. A row comes out the same whatever is beside it."""
    dynamic = levels is not None
    monkeypatch.setattr(DynamicLinear, "LEVELS", levels)
    model = tiny_model().to(dtype)
    with torch.no_grad():
        for _, layer in flora.adapter_layers(model):
            layer.bias.normal_()
    quantize_int8(model, dynamic)
    layer = dict(flora.adapter_layers(model))["transformer.h.0.mlp.c_proj"]
    x = torch.randn(40, layer.in_features).to(dtype)
    x[1] = 0
    exact = x.double()
    if dynamic:
        largest = x.double().abs().amax(-1, keepdim=True)
        exact = (exact / largest * levels).round().nan_to_num() / levels * largest
    expected = exact @ layer.W0().double() + layer.bias.double()
    with torch.inference_mode():
        for rows in (1, 2, 40):
            tolerance = 3e-2 if dtype == torch.bfloat16 else (2e-3 if dynamic else 1e-5)
            torch.testing.assert_close(layer(x[:rows, None])[:, 0].double(), expected[:rows], atol=tolerance, rtol=tolerance)
        if dynamic:
            x[2] = float("nan")
            beside = layer(x[None])[0]
            assert torch.equal(beside[:2], layer(x[None, :2])[0]) and not beside[2].isfinite().any()


def test_int8_dynamic_is_close_and_each_request_returns_what_it_returns_alone(family):
    model = served_model(SERVED[family], family)
    exact = copy.deepcopy(model)
    quantize_int8(model, dynamic=True)
    ids, adapter_ids = torch.randint(0, 97, (7, 9)), torch.arange(7)
    with torch.no_grad():
        expected = exact(ids, adapter_ids)
        assert (model(ids, adapter_ids) - expected).norm() < 0.03 * expected.norm()
    prompts = [row[:3 + i].tolist() for i, row in enumerate(ids)]
    alone = [generate.generate(model, [p], [i], max_new_tokens=8)[0] for i, p in enumerate(prompts)]
    assert generate.generate(copy.deepcopy(model), prompts, range(7), max_new_tokens=8) == alone


def test_adapters_train_on_an_int8_base_with_the_gradients_of_its_values_and_no_float_copy_of_it_is_kept():
    kinds = MIXED["gpt_bigcode"] + EXTRA_KINDS["gpt_bigcode"]
    model, exact = tiny_model(), tiny_model()
    for m in (model, exact):
        m.requires_grad_(False)
        torch.manual_seed(1)
        for kind, rank, targets in kinds:
            random_adapter(m, kind, rank, targets)
    quantize_int8(model)
    shapes = {layer.weight.shape for _, layer in flora.adapter_layers(model)}
    for (_, layer), (_, exact_layer) in zip(flora.adapter_layers(model), flora.adapter_layers(exact)):
        exact_layer.weight.copy_(layer.W0().float().T)
    ids, kept = torch.randint(0, 300, (len(kinds), 9)), []
    adapter_ids = torch.arange(1, len(kinds) + 1)

    def keep(tensor):
        if tensor.is_floating_point() and {tensor.shape, tensor.shape[::-1]} & shapes:
            kept.append(tensor)
        return tensor
    for _, layer in [*flora.adapter_layers(model), *flora.adapter_layers(exact)]:
        layer.path = "expand"
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = train.loss_of(model, ids, ids, adapter_ids)
    assert not kept
    loss.backward()
    train.loss_of(exact, ids, ids, adapter_ids).backward()
    for i in range(1, len(kinds) + 1):
        for ours, theirs in zip(flora.adapter_parameters(model, i).values(), flora.adapter_parameters(exact, i).values()):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("quantize", ["int8", "int8-dynamic"])
def test_generate_and_bench_take_the_flag(quantize, tiny_folder, monkeypatch, capsys):
    run_script(generate.main, ["generate.py", "--weights", str(tiny_folder), "--device", "cpu", "--quantize", quantize,
                               "--prompt", "def", "--max-new-tokens", "3"], monkeypatch)
    assert "tokens/s" in capsys.readouterr().err
    args = bench.parse_args(["--weights", str(tiny_folder), "--device", "cpu", "--quantize", quantize])
    forms = {type(layer.form) for _, layer in flora.adapter_layers(bench.load_model(args))}
    assert forms == {Int8Dynamic if quantize == "int8-dynamic" else Int8}


def test_int8_dynamic_is_refused_where_it_cannot_be_had(monkeypatch):
    monkeypatch.setattr(int8, "can_be_dynamic", lambda device: False)
    with pytest.raises(BadInput, match="needs an x86 CPU; use --quantize int8"):
        quantize_int8(tiny_model(), dynamic=True)


@pytest.mark.parametrize("kind", ["flora", "lora"])
def test_training_on_an_int8_base_lowers_the_loss_and_its_adapter_runs_on_it(kind, tiny_folder, tmp_path, monkeypatch, capsys):
    report = run_train(tiny_folder, tmp_path / kind, "--adapter", kind, "--quantize", "int8")
    assert report["heldout_loss_after"] < report["heldout_loss_before"]
    run_script(generate.main, ["generate.py", "--weights", str(tiny_folder), "--quantize", "int8", "--prompt", "def",
                               "--adapter", report["adapter_file"], "--max-new-tokens", "3"], monkeypatch)
    assert "tokens/s" in capsys.readouterr().err


def test_an_int8_base_is_neither_saved_nor_quantized_again(tmp_path):
    model = tiny_model()
    quantize_int8(model)
    with pytest.raises(BadInput, match="an int8 base has no weights to save"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(BadInput, match="the base is int8 already"):
        quantize_int8(model)
