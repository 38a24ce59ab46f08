"""A base model trained by train.py --adapter none: from scratch, or further."""
import os
import resource
import shutil
import socket
import sys
from pathlib import Path

import pytest

import generate
import train
from extras import pretrain
from model import GPT
from plumbing.files import BadInput, read_json
from plumbing.flags import EMBEDDED
from plumbing.texts import find_files
from plumbing.tokenizer import Tokenizer
from plumbing.tests.started import Started
from plumbing.tests.test_checkpoints import TWO, check_two_processes
from test_flora import HEADERS, check_training, tiny_flags


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
    special = read_json(tmp_path / "base" / "tokenizer_config.json")
    assert special == read_json(Path(EMBEDDED, "tokenizer_config.json"))
    assert tokenizer.token_id(special["eos_token"]) == tokenizer.eos_id


def test_two_processes_give_the_losses_of_one(tiny_folder, tmp_path):
    """Started here as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=str(free.getsockname()[1]))
    flags = tiny_flags(tiny_folder, tmp_path / "two", *TWO, "--adapter", "none")
    for process in [Started("train", *flags, RANK=rank, LOCAL_RANK=rank, **environment)
                    for rank in "01"]:
        status, printed = process.communicate()
        assert status == 0, printed
    check_two_processes("none", tiny_folder, tmp_path)


def test_a_base_trained_into_the_folder_of_a_model_replaces_it_at_the_end_all_at_once(
        tiny_folder, tmp_path, monkeypatch):
    """Until then, and after a kill or a full disk, the model that was there is there."""
    out = shutil.copytree(tiny_folder, tmp_path / "base")
    (out / "added_tokens.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    flags = ["--adapter", "none", "--data", HEADERS, "--steps", "3", "--block-size", "32",
             "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--vocab-size", "500",
             "--eval-tokens", "500", "--out", str(out)]

    def unchanged():
        return all((out / name).read_bytes() == content for name, content in before.items())

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "over_processes", lambda loss, asked: (loss.item(), True))
        train.train(train.parse_args(flags))
    assert unchanged() and (out / "checkpoint.pt").exists()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    refused = pytest.raises(BadInput, match="model.safetensors: cannot be written")
    with monkeypatch.context() as patch, refused:
        patch.setattr(train, "save_checkpoint", lambda *args: None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
        try:
            train.train(train.parse_args([*flags, "--resume"]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert unchanged()
    train.train(train.parse_args([*flags, "--resume"]))
    assert GPT.from_pretrained(out).config.n_layer == 1 and Tokenizer(out).vocab_size == 500
    assert sorted(os.listdir(out)) == ["checkpoint.pt", "config.json", "log.json",
                                       "model.safetensors", "tokenizer.model",
                                       "tokenizer_config.json"]
    train.train(train.parse_args([*flags, "--resume"]))   # of a finished run: the same
    assert Tokenizer(out).vocab_size == 500


def test_the_list_of_the_default_files_has_each_text_once(tmp_path, monkeypatch):
    """So that --data @FILE with it, and with more, holds out the files that the default does."""
    for name, text in dict(a="x = 1\n", b="x = 1\n", c="def f():\n    return\n", d="").items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(pretrain, "default_files", lambda: find_files([str(tmp_path)]))
    monkeypatch.setattr(sys, "argv", ["pretrain", str(tmp_path / "list")])
    pretrain.main()
    found = (tmp_path / "list").read_text().splitlines()
    assert found == [str(tmp_path / "a.py"), str(tmp_path / "c.py")]
