"""Prompts, stops and what is printed."""
import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import generate
from model import GPT
from plumbing.flags import EMBEDDED
from plumbing.prompts import TextPrinter, encode_prompt, stop_check, truncate
from plumbing.tokenizer import Tokenizer
from test_flora import FIXTURES, TINY, run_script


def test_generate_reads_files_and_standard_input_and_stops_where_told(
        tiny_folder, tmp_path, monkeypatch, capsys):
    import io
    (tmp_path / "p.txt").write_text("def f")
    monkeypatch.setattr(sys, "stdin", io.StringIO("class A"))
    common = ["generate.py", "--weights", tiny_folder, "--json", tmp_path / "o.json",
              "--max-new-tokens", 12]
    files = ["--prompt-file", tmp_path / "p.txt", "--prompt-file", "-"]
    run_script(generate.main, [*common, *files], monkeypatch)
    rows = json.loads((tmp_path / "o.json").read_text())
    printed = capsys.readouterr()
    assert [row["prompt"] for row in rows] == ["def f", "class A"]
    assert [len(row["tokens"]) for row in rows] == [12, 12]
    shown = {i: "\n".join(re.findall(rf"^\[{i}\] (.*)$", printed.out, re.M)) for i in (1, 2)}
    assert shown[1].strip() == ("def f" + rows[0]["text"]).strip()
    assert re.search(r"24 tokens in .* s: .* tokens/s, batch 2", printed.err)
    stop = rows[0]["text"][8:12]
    run_script(generate.main, [*common, "--prompt", "def f", "--stop", stop], monkeypatch)
    row = json.loads((tmp_path / "o.json").read_text())[0]
    assert row["text"] == rows[0]["text"][:rows[0]["text"].index(stop)]
    assert row["tokens"] == rows[0]["tokens"][:len(row["tokens"])] and len(row["tokens"]) < 12
    assert capsys.readouterr().out == "def f" + row["text"] + "\n"


def test_truncation_keeps_the_end_of_a_prompt_and_a_bos():
    ids = [1, 5, 6, 7]
    with_bos = [truncate(ids, room, 1) for room in (9, 4, 3, 2, 1, -3)]
    assert with_bos == [ids, ids, [1, 6, 7], [1, 7], [7], [7]]
    assert [truncate(ids, room, None) for room in (4, 3, 1)] == [ids, [5, 6, 7], [7]]


def test_a_prompt_that_does_not_fit_is_truncated_only_when_asked(
        tiny_folder, tmp_path, monkeypatch):
    model, tokenizer = GPT.from_pretrained(tiny_folder), Tokenizer(tiny_folder)
    text = "x," * 40 + "y"
    argv = ["generate.py", "--weights", tiny_folder, "--prompt", text, "--truncate",
            "--max-new-tokens", 4, "--json", tmp_path / "o.json"]
    run_script(generate.main, argv, monkeypatch)
    alone = generate.generate(model, [tokenizer.encode(text)[-60:]], max_new_tokens=4)
    assert json.loads((tmp_path / "o.json").read_text())[0]["tokens"] == alone[0]


def test_a_prompt_that_cannot_be_run_fails_alone(tiny_folder, tmp_path, monkeypatch, capsys):
    argv = ["generate.py", "--weights", tiny_folder, "--max-new-tokens", 3,
            "--json", tmp_path / "o.json"]
    for prompt in ("int a", "caf\udce9", "x," * 40, "int b"):
        argv += ["--prompt", prompt]
    with pytest.raises(SystemExit) as exit:
        run_script(generate.main, argv, monkeypatch)
    printed, rows = capsys.readouterr(), json.loads((tmp_path / "o.json").read_text())
    assert exit.value.code == 2 and "[1] int a" in printed.out and "[4] int b" in printed.out
    assert "prompt 2: a text holds half of a surrogate pair" in printed.err
    assert "prompt 3: a prompt has" in printed.err
    assert [row["error"] is None for row in rows] == [True, False, False, True]
    model, tokenizer = GPT.from_pretrained(tiny_folder), Tokenizer(tiny_folder)
    alone = generate.generate(model, [tokenizer.encode("int b")], max_new_tokens=3)
    assert rows[3]["tokens"] == alone[0] and rows[1]["tokens"] == rows[2]["tokens"] == []


@pytest.mark.parametrize("folder", [TINY, Path(EMBEDDED), FIXTURES / "tiny_llama"],
                         ids=lambda folder: folder.name)
@pytest.mark.parametrize("longest", [0, 2, 9])
def test_what_is_printed_only_ever_grows_and_is_what_is_reported(folder, longest, capsys):
    """300 random texts, with rare characters, and stops that come early, late or never."""
    tokenizer, rng = Tokenizer(folder), random.Random(longest)
    letters = "ab \n" + "é漢🙂\ufffd"
    for _ in range(300):
        text = "".join(rng.choices(letters, k=rng.randrange(1, 30)))
        start = rng.randrange(len(text))
        stops = [text[start:start + longest], "".join(rng.choices("ab\n", k=longest or 1))]
        stops = [stop for stop in stops if stop] if longest else []
        stopped, ids = stop_check(tokenizer, stops), []
        printer, shown = TextPrinter(tokenizer, ["x"], stops), "x"
        for token in tokenizer.encode(text):
            ids.append(token)
            printer.show(0, ids)
            shown += capsys.readouterr().out.removeprefix("x" if len(ids) == 1 else "")
            if stopped and stopped(ids):
                break
        reported = printer.end(0, SimpleNamespace(ids=ids, error=None))
        assert shown + capsys.readouterr().out == "x" + reported + "\n"
        assert not any(stop in reported for stop in stops)


def test_a_prompt_that_fits_is_never_cut_and_the_tokens_of_fim_stay():
    """Of 20 tokens 5 are for the new ones: the prompt loses its start, the suffix its end."""
    tokenizer = Tokenizer(TINY)
    before, between, after = tokenizer.fim_ids
    short, long = tokenizer.encode("1234"), tokenizer.encode("0123456789" * 3)
    assert len(short) == 4 and len(long) == 30
    for new in (5, 16, 600):
        assert encode_prompt(tokenizer, "1234", None, 20, new) == short
    assert encode_prompt(tokenizer, "0123456789" * 3, None, 20, 5) == long[-15:]
    assert encode_prompt(tokenizer, "0123456789" * 3, None, 20, 600) == long[-10:]
    fim = [before, *short, between, *short, after]
    assert encode_prompt(tokenizer, "1234", "1234", 20, 19) == fim
    cut = encode_prompt(tokenizer, "0123456789" * 3, "0123456789" * 3, 20, 5)
    assert cut == [before, *long[-6:], between, *long[:6], after]
    cut = encode_prompt(tokenizer, "0123456789" * 3, "1234", 20, 5)
    assert cut == [before, *long[-8:], between, *short, after]
