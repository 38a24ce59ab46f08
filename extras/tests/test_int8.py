"""An 8-bit base: close to the full one, and exact where its own values are the reference."""
import pytest
import torch

import flora
import generate
import train
from extras.int8 import quantize_int8
from extras.tests.conftest import EXTRA_KINDS
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


@pytest.mark.parametrize("kind", ["flora", "lora"])
def test_training_on_an_int8_base_lowers_the_loss_and_its_adapter_runs_on_it(kind, tiny_folder, tmp_path, monkeypatch, capsys):
    report = run_train(tiny_folder, tmp_path / kind, "--adapter", kind, "--quantize", "int8")
    assert report["heldout_loss_after"] < report["heldout_loss_before"]
    run_script(generate.main, ["generate.py", "--weights", str(tiny_folder), "--quantize", "int8", "--prompt", "def",
                               "--adapter", report["adapter_file"], "--max-new-tokens", "3"], monkeypatch)
    assert "tokens/s" in capsys.readouterr().err
