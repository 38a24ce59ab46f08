"""Training of the kinds and families in extras/: what the core promises of its own."""
import json
import signal

import pytest

import flora
import generate
from model import GPT
from plumbing.tests.test_checkpoints import (
    test_a_killed_or_interrupted_run_resumes_with_the_losses_of_an_uninterrupted_one as check_resume)
from plumbing.tokenizer import Tokenizer
from test_flora import run_script, run_train
from test_flora import (
    test_training_lowers_heldout_loss_and_a_seed_gives_the_same_losses_twice as check_losses)

LLAMA_TARGETS = {"flora": ["q_proj", "v_proj"], "lora": ["q_proj", "v_proj"],
                 "ia3": ["k_proj", "v_proj", "down_proj"], "ffba": ["attn", "mlp"],
                 "hira": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("kind,folder", [
    ("ffba", "tiny_folder"), ("hira", "tiny_folder"),
    *[(kind, "tiny_llama_folder") for kind in LLAMA_TARGETS]])
def test_training_lowers_heldout_loss_and_a_seed_gives_the_same_losses_twice(
        kind, folder, request, tmp_path):
    check_losses(kind, request.getfixturevalue(folder), tmp_path)


def test_an_interrupted_run_resumes_with_the_losses_of_an_uninterrupted_one(tiny_folder, tmp_path):
    check_resume((signal.SIGINT, "ffba"), tiny_folder, tmp_path)


@pytest.mark.parametrize("kind", LLAMA_TARGETS)
def test_adapters_of_a_llama_go_by_default_where_peft_puts_them(
        kind, tiny_llama_folder, tmp_path, monkeypatch):
    """Trained, interrupted by nothing, resumed at its end, and used from the command line."""
    flags = ["--adapter", kind, "--steps", 2, "--eval-every", 1]
    for more in ([], ["--resume"]):
        report = run_train(tiny_llama_folder, tmp_path / "run", *flags, *more)
        assert report["targets"] == LLAMA_TARGETS[kind]
    run_script(generate.main, ["generate.py", "--weights", tiny_llama_folder,
                               "--adapter", report["adapter_file"], "--prompt", "return",
                               "--max-new-tokens", 5, "--json", tmp_path / "o.json"], monkeypatch)
    row = json.loads((tmp_path / "o.json").read_text())[0]
    tokenizer, model = Tokenizer(tiny_llama_folder), GPT.from_pretrained(tiny_llama_folder)
    adapter_id = flora.load_adapter(model, report["adapter_file"])
    prompt = [1] + tokenizer.encode("return")
    assert row["tokens"] == generate.generate(model, [prompt], [adapter_id], max_new_tokens=5,
                                              eos_id=2)[0]
    shown = [i for i in row["tokens"] if i != 2]
    assert row["text"] == tokenizer.decode(shown, continues=True)
