"""A base model trained by train.py --adapter none: from scratch, or further."""
import pytest

import generate
import train
from model import GPT, Tokenizer
from test_flora import HEADERS, check_training, check_two_processes


@pytest.mark.parametrize("folder", ["tiny_folder", "tiny_llama_folder"])
def test_training_lowers_heldout_loss_and_a_seed_gives_the_same_losses_twice(
        folder, request, tmp_path):
    report = check_training(request.getfixturevalue(folder), tmp_path, "--adapter", "none")
    model = GPT.from_pretrained(tmp_path / "a")
    assert Tokenizer(tmp_path / "a").vocab_size == model.config.vocab_size
    assert report["adapter_file"] is None
    assert report["trainable_parameters"] == report["total_parameters"]


def test_a_base_model_from_scratch_becomes_a_folder_that_loads(tmp_path):
    args = train.parse_args(["--adapter", "none", "--data", HEADERS, "--steps", "3",
                             "--block-size", "32", "--n-layer", "1", "--n-head", "2",
                             "--n-embd", "16", "--vocab-size", "500", "--eval-tokens", "500",
                             "--out", str(tmp_path / "base")])
    report = train.train(args)
    model, tokenizer = GPT.from_pretrained(tmp_path / "base"), Tokenizer(tmp_path / "base")
    assert model.config.n_layer == 1 and tokenizer.vocab_size == 500
    assert report["total_parameters"] == sum(p.numel() for p in model.parameters())
    tokens = generate.generate(model, [tokenizer.encode("int x")], max_new_tokens=5)[0]
    assert len(tokens) == 5


def test_two_processes_give_the_losses_of_one(tiny_folder, tmp_path):
    check_two_processes("none", tiny_folder, tmp_path)
