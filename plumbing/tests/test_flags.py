"""Flags: bad input is one sentence and exit status 2."""
import io
import json
import argparse
import subprocess
import sys

import pytest

import bench
import generate
import train
from model import GPT
from plumbing.files import BadInput
from plumbing.flags import EMBEDDED, Help, get_device, run_main
from plumbing.provenance import base_digest
from plumbing.tokenizer import Tokenizer
from test_flora import HERE, run_script, tiny_flags


@pytest.mark.parametrize("script,flags,sentence", [
    ("train", "--rank 0", "--rank is 0; use a whole number of at least 1"),
    ("train", "--data {empty}", "--data holds 0 distinct readable text files"),
    ("train", "--data {empty}/none*.h", "none*.h: no such file, folder or glob match"),
    ("train", "--targets wq", "unknown target 'wq'; use one of c_attn, c_attn.qk"),
    ("train", "--block-size 65", "--block-size 65 is more than the model's context of 64"),
    ("train", "--weights {empty}", "config.json: no such file"),
    ("train", "--data {short} --block-size 64",
     "tokens, fewer than --block-size 64; give more files"),
    ("train", "--device tpu", "--device tpu: not usable here"),
    ("train", "--out {short}/a.h", "a.h: cannot be made a folder"),
    ("generate", "--prompt a --device hpu", "--device hpu: not usable here"),
    ("generate", "--prompt a --weights bigcode/starcoderbase-1b",
     "bigcode/starcoderbase-1b: no such model folder; if it is a name on Hugging Face's hub, "
     "download it with: hf download bigcode/starcoderbase-1b --local-dir starcoderbase-1b"),
    ("train", "--steps -1", "--steps is -1; use a whole number of at least 0"),
    ("generate", "", "no prompt; give --prompt TEXT or --prompt-file FILE"),
    ("generate", "--prompt a --prompt b --adapter x --adapter y --adapter z",
     "3 --adapter for 2 prompts"),
    ("generate", "--prompt a --adapter {empty}/x", "x: no such adapter file"),
    ("generate", "--prompt a --adapter {flora1}", "was trained on another base model"),
    ("generate", "--prompt a --suffix b", "has no fill-in-the-middle tokens"),
    ("generate", "--prompt {long}",
     "tokens, more than the model's context of 64 (n_positions); shorten it"),
    ("generate", "--prompt-file {empty}/x", "not readable as UTF-8 text"),
    ("generate", "--prompt a --temperature -1", "--temperature and --top-k must be at least 0"),
    ("generate", "--prompt a --json {empty}/no/x.json", "x.json: cannot be written"),
    ("generate", "--prompt a --json {empty}", "empty: is a folder; name a file"),
    ("generate", "--prompt a --json {short}/a.h", "a.h: holds something else than this writes"),
    ("generate", "--prompt a --stop=", "--stop is empty"),
    ("generate", "--prompt a --seed 99999999999999999999", "seed is 99999999999999999999"),
    ("generate", "--prompt caf\udce9", "is not Unicode"),
    ("train", "--json {short}/a.h", "a.h: holds something else than this writes"),
])
def test_bad_input_is_one_sentence_and_exit_status_2(
        script, flags, sentence, tiny_folder, embedded_adapters, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    for i, name in enumerate("abc"):
        (tmp_path / "short" / f"{name}.h").write_text(f"int {name};\n" * (i + 1))
    words = dict(empty=tmp_path / "empty", short=tmp_path / "short", long="x," * 40, base=EMBEDDED,
                 flora1=embedded_adapters["flora1"])
    flags = [flag.format(**words) for flag in flags.split()]
    if script == "train":
        flags = tiny_flags(tiny_folder, tmp_path / "out") + flags
    else:
        flags = ["--weights", str(tiny_folder)] + flags
    with pytest.raises(SystemExit) as exit:
        run_script(getattr(sys.modules[script], "main"), [f"{script}.py", *flags], monkeypatch)
    printed = capsys.readouterr()
    assert exit.value.code == 2
    last = printed.err.splitlines()[-1]
    assert sentence in last and f"{script}.py: error: " in last


def test_bench_refuses_what_it_cannot_run_in_a_sentence(served_folder, tmp_path, monkeypatch):
    for flags, sentence in [
            (["--ranks", "0"], "--ranks is 0; use a whole number of at least 1"),
            (["--num-adapters", "0"], "--num-adapters is 0"),
            (["--request-rate", "-1"], "--request-rate is -1.0; use a number above 0"),
            (["--model", "starcoder"], "--model needs --random-weights"),
            (["--random-weights"], "--model needs"),
            (["--model", "starcodr", "--random-weights"],
             "--model starcodr: unknown; use one of tiny_starcoder_py"),
            (["--rows", "lore"], "--rows lore"),
            (["--scale", "1"],
             "--scale 1.0: the longest request has .* more than the model's context of 64; use"),
            (["--weights", tmp_path / "nowhere"], "nowhere: no such model folder")]:
        argv = ["bench.py", "--weights", served_folder, *flags]
        monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
        with pytest.raises(BadInput, match=sentence):
            bench.main()


def test_a_reader_that_goes_away_ends_a_script_without_a_traceback():
    lines = ("from plumbing.flags import run_main\n"
             "run_main(lambda: [print('x' * 99) for _ in range(9999)])")
    script = subprocess.Popen([sys.executable, "-c", lines], cwd=HERE, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    script.stdout.readline()
    script.stdout.close()
    assert script.stderr.read() == "" and script.wait() == 141


def test_a_device_that_is_not_here_is_told_in_one_short_line():
    for name in ("mps", "tpu", "hpu"):
        with pytest.raises(BadInput, match=f"--device {name}: not usable here .*; use cpu") as told:
            get_device(name)
        assert len(str(told.value)) < 150


def test_only_what_looks_like_a_name_on_the_hub_is_taken_for_one(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for folder, hub in [("org/model-1b.v2", True), ("models/model", False), ("model", False),
                        ("./model", False), ("../a/b", False), ("a/b/c", False), ("/a/b", False)]:
        for load in (Tokenizer, GPT.from_pretrained, base_digest):
            with pytest.raises(BadInput, match=f"^{folder}: no such model folder") as told:
                load(folder)
            assert ("hf download" in str(told.value)) == hub


@pytest.mark.parametrize("encoding,shown", [("latin-1", "é \\u2192"), ("ascii", "\\xe9 \\u2192")])
def test_output_that_is_not_utf8_shows_escapes_and_loses_nothing(
        encoding, shown, tiny_folder, tmp_path, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", [
        "generate.py", "--weights", str(tiny_folder), "--prompt", "é →", "--max-new-tokens", "4",
        "--json", str(tmp_path / "o.json")])
    run_main(generate.main)
    out.flush()
    row = json.loads((tmp_path / "o.json").read_text())[0]
    text = row["prompt"] + row["text"]
    assert out.buffer.getvalue().decode(encoding).startswith(shown) and row["prompt"] == "é →"
    assert out.buffer.getvalue() == (text + "\n").encode(encoding, "backslashreplace")


class Parsing(Exception):
    """In the place of parsing."""


def parser_of(module, monkeypatch):
    """The ArgumentParser of a script."""
    found = []

    def stop(parser, *args, **kwargs):
        found.append(parser)
        raise Parsing

    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py"])
    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    with pytest.raises(Parsing):
        (module.parse_args if hasattr(module, "parse_args") else module.main)()
    return found[0]


def every_action(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from every_action(command)
        else:
            yield parser, action


def check_help(module, monkeypatch):
    """Each flag of a script says what it is, and what it is when left out."""
    for parser, action in every_action(parser_of(module, monkeypatch)):
        where = f"{parser.prog}: {action.option_strings or action.dest}"
        assert action.help and parser.formatter_class is Help, where
        told = parser._get_formatter()._expand_help(action)
        if action.option_strings and not isinstance(action, argparse._HelpAction):
            assert "default" in told or "(required)" in told, f"{where}: {told}"
            assert ("auto" in told) <= ("auto" in (action.choices or [])), f"{where}: {told}"


@pytest.mark.parametrize("module", [train, generate, bench], ids=lambda module: module.__name__)
def test_every_flag_of_the_core_has_a_text_and_tells_its_default(module, monkeypatch):
    check_help(module, monkeypatch)
