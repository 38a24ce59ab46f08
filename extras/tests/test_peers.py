"""Serving beside other engines: what can be tested without them."""
import sys
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch

import flora
import model
from extras import llama_cpp, peers, peers_engines
from generate import generate
from model import GPT
from plumbing.files import BadInput, read_json
from plumbing.outputs import write_json
from test_flora import CONFIGS, TINY, run_script, tiny_model


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setitem(model.PRESETS, "tiny", CONFIGS["gpt_bigcode"])
    return peers.parse_args(["--folder", str(tmp_path / "peers"), "--model", "tiny", "--requests", "3",
                             "--ranks", "1", "2", "--prompt", "5", "--new", "6", "--repeats", "3"])


def test_our_rows_give_each_request_the_tokens_of_its_folder_alone(args):
    peers.prepare(args)
    prompts = torch.randint(1, 300, (3, 5)).tolist()
    tokens = {row: run() for row, run in peers.our_rows(args, prompts).items()}
    base = GPT.from_pretrained(f"{args.folder}/model")
    expected = {"base": generate(base, prompts, max_new_tokens=6)}
    for kind, rank in peers.kinds_and_ranks(args):
        ids = [flora.load_adapter(base, str(place)) for place in peers.places(args, kind, rank)]
        alone = [generate(base, [prompt], [i], max_new_tokens=6)[0] for prompt, i in zip(prompts, ids)]
        expected[f"{peers.NAMES[kind]} r{rank}"] = alone
        assert alone != expected["base"]
    same = peers.agreements(tokens, expected)
    assert len(same) == 12
    assert all(n == [6, 6, 6] for (_, _, dtype), n in same.items() if dtype == "float32")
    assert same["this", "base", "int8"][0] > 0 and same["this", "base", "int8-dynamic"][0] > 0


def test_a_row_that_leaves_the_tokens_is_timed_only_at_a_near_tie(args, monkeypatch):
    monkeypatch.setattr(peers, "Reference", OurReference)
    peers.prepare(args)
    prompts = torch.randint(1, 300, (3, 5)).tolist()
    expected = {"base": OurReference(args, "base").tokens(prompts)}
    first, *others = expected["base"]
    other = [first, *([*row[:4], (row[4] + 1) % 300, 0] for row in others)]
    tokens = {("llama.cpp", "base", "float32"): other, ("llama.cpp", "base", "int8"): other,
              ("this", "base", "float32"): expected["base"]}
    (row, found), = peers.partings(args, prompts, tokens, expected).items()
    assert row == ("llama.cpp", "base", "float32")
    assert [place[:2] for place in found] == [(1, 4), (2, 4)]
    assert min(nats for _, _, nats in found) > 0
    timed, said = peers.verdict(row, [(1, 4, 0.02), (2, 4, 1e-4)])
    assert not timed and said == (
        "llama.cpp, base, float32, left out: other tokens in request 1 at its token 4, which "
        "transformers prefers by 0.02 nats; request 2 at its token 4, which transformers "
        "prefers by 0.0001 nats.")
    timed, said = peers.verdict(row, [(2, 4, 1e-4)])
    assert timed and said.startswith("llama.cpp, base, float32, timed: other tokens in request 2")
    with pytest.raises(BadInput, match="this, base, float32, left out: .* so nothing is timed"):
        peers.verdict(("this", "base", "float32"), [(1, 4, 0.02)])


class OurReference(peers.Reference):
    """The base, by this project's model in the place of transformers'."""

    def __init__(self, args, what):
        self.args, self.what, self.base = args, what, GPT.from_pretrained(f"{args.folder}/model")

    def tokens(self, prompts):
        return generate(self.base, prompts, max_new_tokens=self.args.new)

    def model(self, input_ids):
        return SimpleNamespace(logits=self.base(input_ids))


def test_weights_are_made_once_and_a_folder_of_other_weights_is_refused(args, monkeypatch):
    peers.prepare(args)
    file = peers.places(args, "flora", 2)[1] / "adapter_model.safetensors"
    made = file.read_bytes()
    args.seed = 7
    peers.prepare(args)
    assert file.read_bytes() == made
    args.model = "starcoder-cpu"
    with pytest.raises(BadInput, match="holds another model than starcoder-cpu; use another --folder"):
        peers.prepare(args)


def test_an_engine_that_is_missing_is_skipped_by_name_but_not_the_reference(args, monkeypatch, capsys):
    peers.prepare(args)
    for name in ("ctranslate2", "xllamacpp", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadInput, match="transformers is not installed, and nothing is timed before"):
        peers.all_rows(args, [[1]])
    monkeypatch.setitem(sys.modules, "gguf", torch)   # something that can be imported
    monkeypatch.setattr(peers, "transformers_rows", lambda *_: {})
    monkeypatch.setattr(peers, "version", lambda package: "1.0")
    rows, versions = peers.all_rows(args, [[1]])
    assert {engine for engine, _, _ in rows} == {"this"} and list(versions) == ["transformers", "peft"]
    said = capsys.readouterr().out
    assert "CTranslate2: skipped, as ctranslate2 is not installed" in said
    assert "llama.cpp: skipped, as xllamacpp is not installed" in said


def test_the_table_compares_rows_in_the_same_round(args, monkeypatch, capsys):
    """18 tokens a run; seconds of the three rows in three rounds. A fourth row is left out."""
    args.json = str(args.folder) + ".json"
    clock = iter([0, 1, 0, 2, 0, 4, 0, 2, 0, 3, 0, 9, 0, 4, 0, 16, 0, 8])
    rows = {("this", "base", "float32"): None, ("other", "LoRA r1", "int8"): None,
            ("transformers", "base", "float32"): None, ("wrong", "base", "float32"): None}
    monkeypatch.setattr(peers.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(peers, "PAUSE", 0)
    monkeypatch.setattr(peers, "all_rows", lambda *_: (dict.fromkeys(rows, list), {"peft": "0.21"}))
    monkeypatch.setattr(peers, "tokens_of", lambda *_: (
        {row: [[1] * 6] * 3 for row in rows},
        {"base": [[1] * 6] * 3, "LoRA r1": [[1] * 6, [1, 2] * 3, [2] * 6]}))
    monkeypatch.setattr(peers, "partings", lambda *_: {("wrong", "base", "float32"): [(0, 3, 0.5)]})
    peers.compare(args)
    table = capsys.readouterr().out
    assert "| this | base | float32 | 9.0 [4.5–18.0] | 1.00 | 4.00 | 6 of 6 |" in table  # 4, 4.5, 2
    assert "| other | LoRA r1 | int8 | 6.0 [1.1–9.0] | 0.50 |  | 2.333 of 6 |" in table   # of .5, .67, .25
    assert "\n\nwrong, base, float32, left out: other tokens in request 0 at its token 3" in table
    data = read_json(args.json)
    assert data["versions"] == {"peft": "0.21"} and data["rows"][1]["tokens_per_second"] == 6


@pytest.mark.parametrize("flags, message", [
    (["--requests", "0"], "--requests is 0; use a whole number of at least 1"),
    (["--ranks", "1", "0"], "--ranks is 0; use a whole number"),
    (["--prompt", "8000", "--new", "193"], "are more tokens than the context of tiny_starcoder_py .8192."),
    (["--model", "gpt"], "--model gpt: unknown; use one of tiny_starcoder_py")])
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(BadInput, match=message):
        peers.parse_args(flags)


def test_every_tensor_has_a_name_in_llama_cpp():
    names = {llama_cpp.gguf_name(name) for name in tiny_model().base_parameters()}
    assert len(names) == len(tiny_model().base_parameters())
    assert {"token_embd.weight", "position_embd.weight", "output_norm.bias", "blk.0.attn_norm.bias",
            "blk.1.attn_qkv.weight", "blk.1.ffn_down.bias"} <= names


def test_exports_hold_the_adapter_both_ways_and_an_engine_is_told_by_its_last_line(
        tmp_path, monkeypatch, capsys):
    folder = tmp_path / "exports"
    run_script(peers_engines.main, ["peers_engines", "export", TINY, "--kinds", "hira", "--out", folder],
               monkeypatch)
    said = read_json(folder / "exports.json")["tiny-hira"]
    merged = GPT.from_pretrained(folder / "tiny-hira" / "merged")
    assert generate(merged, said["prompts"], max_new_tokens=24) == said["tokens"]
    base = GPT.from_pretrained(said["base"])
    i = flora.load_adapter(base, str(folder / "tiny-hira" / "peft"))
    assert generate(base, said["prompts"], [i] * 4, max_new_tokens=24) == said["tokens"]

    tokens = [said["tokens"][0], *[[0] * 24] * 3]
    monkeypatch.setitem(peers_engines.ENGINES, "vllm", lambda *_: ("vllm 9", tokens))
    flags = ["peers_engines", "vllm", folder]
    run_script(peers_engines.main, [*flags, "--case", "tiny-hira", "peft"], monkeypatch)
    answers = [CompletedProcess([], 0, "a warning\n" + capsys.readouterr().out.splitlines()[-1], ""),
               CompletedProcess([], 1, "", "Traceback\nValueError: no HiRA here\n"),
               CompletedProcess([], 0, "commit", "")]   # of git, for --json
    monkeypatch.setattr(peers_engines.subprocess, "run", lambda *_, **__: answers.pop(0))
    run_script(peers_engines.main, [*flags, "--json", tmp_path / "found.json"], monkeypatch)
    assert capsys.readouterr().out.splitlines() == [
        "tiny-hira, merged: vllm 9: 1 of 4 prompts with our tokens",
        "tiny-hira, peft: ValueError: no HiRA here"]
    assert read_json(tmp_path / "found.json")["rows"] == [
        dict(export="tiny-hira", form="merged", prompts=4, engine="vllm 9", same=1),
        dict(export="tiny-hira", form="peft", prompts=4, error="ValueError: no HiRA here")]


@pytest.mark.parametrize("engine, case, message", [
    ("ctranslate2", "a peft", "CTranslate2 has no adapters"),
    ("llama.cpp", "a peft", "has no converter for adapters"),
    ("vllm", "b peft", "exports.json has no such export"),
    ("vllm", "a lora", "--case a lora: ")])
def test_what_an_engine_cannot_open_is_said_in_a_sentence(
        engine, case, message, tmp_path, monkeypatch, capsys):
    write_json(tmp_path / "exports.json", {"a": {}})
    with pytest.raises(SystemExit) as stop:
        run_script(peers_engines.main, ["peers_engines", engine, tmp_path, "--case", *case.split()],
                   monkeypatch)
    assert stop.value.code == 2 and message in capsys.readouterr().err
