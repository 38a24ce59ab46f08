"""A LoRA made into a FLoRA: the fit, then distillation."""
import pytest
import torch

import flora
from extras.lora_to_flora import distillation_loss, fit_flora, flora_from_lora
from flora import BASE
from model import GPT
from plumbing.files import BadInput
from test_flora import losses, random_adapter, run_train
from plumbing.tests.test_flags import (
    test_bad_input_is_one_sentence_and_exit_status_2 as check_bad_input)
from test_flora import tiny_model


def test_the_fit_recovers_what_flora_can_be_and_never_grows_worse():
    torch.manual_seed(0)
    W0, rank = torch.randn(12, 20), 3
    W = W0 * (1 + torch.randn(12, rank - 1) @ torch.randn(rank - 1, 20))   # exactly W0 ∘ (rank 3)
    A, B, errors = fit_flora(W0, W, rank, rounds=100)
    torch.testing.assert_close(W0 * (B @ A).float(), W, rtol=0, atol=1e-3)
    lora = W0 + torch.randn(12, 2) @ torch.randn(2, 20)                        # what it cannot be
    last = []
    for rank in (1, 2, 4, 8, 12):
        A, B, errors = fit_flora(W0, lora, rank)
        assert A.shape == (rank, 20) and B.shape == (12, rank)
        assert errors[0] == pytest.approx((lora - W0).norm().item())           # the identity's
        assert all(after <= before + 1e-9 * errors[0] for before, after in zip(errors, errors[1:]))
        last.append(errors[-1])
    assert last == sorted(last, reverse=True) and last[-1] < 1e-3 * errors[0]  # rank 12: all of it


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn.qk", "mlp.c_proj"]])
def test_a_flora_of_full_rank_has_its_loras_logits(targets):
    model, ids = tiny_model(), torch.randint(0, 300, (2, 9))
    wanted = model(ids, torch.tensor([random_adapter(model, "lora", 2, targets, size=0.1)] * 2))
    exact, error = flora_from_lora(model, 1, 32)
    assert error < 1e-3 and (model(ids, torch.tensor([exact] * 2)) - wanted).abs().max() < 1e-2
    rank_2, error = flora_from_lora(model, 1, 2)
    assert 0.3 < error < 1
    assert [a.target for a in flora.adapters_of(model, rank_2).values()] == targets * 2
    with pytest.raises(BadInput, match="adapter 2 is of kind flora; a FLoRA is fitted to a LoRA"):
        flora_from_lora(model, exact, 1)


def test_distillation_teaches_the_loras_predictions_without_labels(tiny_folder, tmp_path):
    lora = run_train(tiny_folder, tmp_path / "lora", "--adapter", "lora", "--targets", "all",
                     "--lr", 0.02)
    flags = ["--adapter", "flora", "--rank", 2, "--from-lora", lora["adapter_file"]]
    fit = run_train(tiny_folder, tmp_path / "fit", *flags, "--steps", 0)
    student = run_train(tiny_folder, tmp_path / "student", *flags)
    base, teacher = lora["heldout_loss_before"], lora["heldout_loss_after"]
    for report in (fit, student):
        assert report["heldout_loss_base"] == pytest.approx(base)
        assert report["heldout_loss_teacher"] == pytest.approx(teacher)
        gained = base - report["heldout_loss_after"]
        assert report["share_of_gain"] == pytest.approx(gained / (base - teacher))
        assert report["targets"] == ["c_attn", "c_proj", "c_fc", "mlp.c_proj"]
        assert 0.3 < report["fit_error"] < 1
    assert fit["heldout_loss_after"] == fit["heldout_loss_before"] == student["heldout_loss_before"]
    assert student["share_of_gain"] > fit["share_of_gain"] + 0.05
    resumed = run_train(tiny_folder, tmp_path / "student", *flags, "--resume")  # from its end
    assert resumed["heldout_loss_after"] == student["heldout_loss_after"]
    assert losses(resumed) == losses(student)

    model = GPT.from_pretrained(tiny_folder)
    files = [report["adapter_file"] for report in (lora, student, fit)]
    adapters = [flora.load_adapter(model, file) for file in files]
    x, ids = torch.randint(0, 4096, (2, 32)), torch.ones(2, dtype=torch.int64)
    far = [distillation_loss(model, model, x, i * ids, adapters[0] * ids).item()
           for i in [*adapters, BASE]]
    assert abs(far[0]) < 1e-6 and far == sorted(far)   # KL: the LoRA itself, student, fit, base
    with pytest.raises(BadInput, match="was made with another LoRA .fingerprint [0-9a-f]*, not None"):
        run_train(tiny_folder, tmp_path / "student", "--adapter", "flora", "--rank", 2, "--resume")


@pytest.mark.parametrize("flags,sentence", [
    ("--adapter ia3 --from-lora x", "--from-lora makes a FLoRA; it does not go with --adapter ia3"),
    ("--targets c_fc --from-lora x", "--from-lora takes the LoRA's targets; leave out --targets"),
    ("--fast --from-lora x", "--fast is for a loss on text, not for --from-lora's; leave it out"),
    ("--from-lora {empty}/x", "x: no such adapter file"),
    ("--from-lora {flora1} --weights {base}",
     "adapter 1 is of kind flora; a FLoRA is fitted to a LoRA"),
])
def test_bad_input_is_one_sentence_and_exit_status_2(
        flags, sentence, tiny_folder, embedded_adapters, tmp_path, monkeypatch, capsys):
    check_bad_input("train", flags, sentence, tiny_folder, embedded_adapters, tmp_path, monkeypatch,
                    capsys)
