"""extras/requests.py: JSONL in, JSONL out, and an interrupted run that is completed."""
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import flora
import generate
from extras import requests as requests_file
from flora import BASE
from model import GPT
from plumbing.files import BadInput
from plumbing.flags import EMBEDDED, run_main
from plumbing.tests.conftest import script, write_jsonl
from plumbing.tests.started import Started
from plumbing.tokenizer import Tokenizer
from test_flora import FIXTURES, HERE, run_script, trained


def test_requests_in_results_out_and_an_interrupted_run_is_completed(tmp_path, run_here):
    """Results equal those of generate(), a too long request fails alone, done work stays."""
    model, tokenizer = GPT.from_pretrained(EMBEDDED), Tokenizer(EMBEDDED)
    adapter = str(tmp_path / "a.safetensors")
    flora.save_adapter(model, trained(model, flora.add_adapter(model, "flora", 2)), adapter)
    lines = [dict(prompt="def f(x):", max_new_tokens=5), dict(prompt="import ", adapter=adapter),
             dict(prompt="x " * 600),
             dict(prompt="class A", adapter=adapter, stop=["e"], temperature=0.5, seed=7)]
    requests, results = write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = ["--requests", requests, "--results", results, "--max-new-tokens", 9, "--slots", 2]
    run = run_here("generate.py", *command)
    assert run.returncode == 0 and "4 requests, 1 failed" in run.stderr, run.stderr
    got = {r["line"]: r for r in map(json.loads, results.read_text().splitlines())}
    assert sorted(got) == [1, 2, 3, 4]
    assert "shorten it" in got[3]["error"] and got[3]["tokens"] == []
    for line, i, settings in [(1, BASE, dict(max_new_tokens=5)), (2, 1, dict(max_new_tokens=9))]:
        ids = generate.generate(model, [tokenizer.encode(lines[line - 1]["prompt"])], [i],
                                eos_id=tokenizer.eos_id, **settings)[0]
        assert got[line]["tokens"] == ids and got[line]["error"] is None
        assert got[line]["text"] == tokenizer.decode(ids)
    assert "e" not in got[4]["text"] and got[4]["seed"] == 7

    whole = results.read_text().splitlines(keepends=True)
    results.write_text("".join(whole[:2]) + whole[2][:20])  # killed in the middle of a line
    run = run_here("generate.py", *command)
    assert run.returncode == 0 and "2 requests, " in run.stderr, run.stderr
    again = results.read_text().splitlines(keepends=True)
    assert again[:2] == whole[:2] and sorted(again) == sorted(whole)
    write_jsonl(requests, [dict(prompt="another")] + lines[1:])
    run = run_here("generate.py", *command)
    assert run.returncode == 2
    assert "line 1 of the requests was another one then; move the file" in run.stderr


def test_requests_that_make_no_sense_are_refused_in_a_sentence(tmp_path):
    file = tmp_path / "in.jsonl"
    for text, sentence in [
            ("{", "not readable as JSONL .line 1: "), ("", "holds no request"),
            ("[1]", "line 1: needs a JSON object"),
            ('{"prompt": "a"}\n{"prompt": "b", "top": 1}',
             "line 2: unknown key 'top'; use prompt, adapter"),
            ('{"prompt": "a", "max_new_tokens": "9"}',
             "max_new_tokens is '9', which is no whole number"),
            ('{"prompt": "a", "temperature": true}', "temperature is True, which is no number"),
            ('{"prompt": "a", "stop": "x"}', "stop is 'x', which is no list of texts"),
            ('{"prompt": "a", "stop": [""]}', "which is no list of texts")]:
        file.write_text(text)
        with pytest.raises(BadInput, match=sentence):
            requests_file.read_requests(str(file), {})
    with pytest.raises(BadInput, match="nothing.jsonl: not readable"):
        requests_file.read_requests(str(tmp_path / "nothing.jsonl"), {})
    for flags in (["--requests", file], ["--requests", file, "--results", file, "--prompt", "x"]):
        with pytest.raises(SystemExit) as exit:
            generate.parse_args(list(map(str, flags)))
        assert exit.value.code == 2
    with pytest.raises(BadInput, match="--slots is 0; use a whole number of at least 1"):
        generate.parse_args(["--requests", str(file), "--results", str(file), "--slots", "0"])


@pytest.fixture
def tiny_requests(tmp_path):
    """A lists of requests over fixtures/tiny, the flags for them, and the file of results."""
    model = GPT.from_pretrained(FIXTURES / "tiny")
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        adapter_id = trained(model, flora.add_adapter(model, "lora", 2))
        file = str(tmp_path / f"{name}.safetensors")
        flora.save_adapter(model, adapter_id, file, dict(seed=seed))
    lines = [dict(prompt=f"def f{i}(", max_new_tokens=3) for i in range(6)]
    requests, results = write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    return lines, results, [
        "--weights", FIXTURES / "tiny", "--adapter", tmp_path / "a.safetensors",
        "--requests", requests, "--results", results]


def serve(*flags):
    requests_file.serve(generate.parse_args([str(flag) for flag in flags]))


def rows_of(file):
    return {row["line"]: row for row in map(json.loads, file.read_text().splitlines())}


def test_results_of_another_adapter_base_or_dtype_are_refused(tiny_requests, tmp_path, capsys):
    """By content: a retrained adapter at the same path differs, a moved one does not."""
    _, results, flags = tiny_requests
    serve(*flags)
    before = results.read_bytes()
    other = shutil.copytree(FIXTURES / "tiny", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | dict(layer_norm_epsilon=0.01)))
    for more, sentence in [
            (["--dtype", "bfloat16"], "--dtype float32, not bfloat16"),
            (["--truncate"], "--truncate False, not True"),
            (["--quantize", "int8"], "--quantize None, not int8"),
            (["--weights", other], "another base model")]:
        told = f"--results .*out.jsonl: line . was made with {sentence}.*; move the file away"
        with pytest.raises(BadInput, match=told):
            serve(*flags, *more)
    with pytest.raises(BadInput, match="was made with another adapter"):
        serve(*replaced(flags, "--adapter", tmp_path / "b.safetensors"))
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "moved.safetensors")
    serve(*replaced(flags, "--adapter", tmp_path / "moved.safetensors"))
    os.replace(tmp_path / "b.safetensors", tmp_path / "a.safetensors")   # retrained
    with pytest.raises(BadInput, match="was made with another adapter"):
        serve(*flags)
    assert results.read_bytes() == before and "0 requests" in capsys.readouterr().err
    old = rows_of(results).values()
    for row in old:
        del row["made_with"]
    write_jsonl(results, old)
    serve(*flags)
    assert "6 results, written before results had fingerprints" in capsys.readouterr().err


def replaced(flags, flag, value):
    i = flags.index(flag)
    return [*flags[:i], flag, value, *flags[i + 2:]]


def test_a_file_that_is_not_of_results_is_kept_and_a_damaged_line_lost_alone(tiny_requests, capsys):
    _, results, flags = tiny_requests
    serve(*flags)
    uncut = results.read_bytes()
    for text in (b"notes\n", b'{"a": 1}', b"[1]\n" + uncut, uncut + b"{}\n", b"\x00\xff\n",
                 b'{\n "line": 1\n}\n', b'{"line": [1]}\n', b'{"line": true}\n', b'{"other": "cut of'):
        results.write_bytes(text)
        with pytest.raises(BadInput, match="is not a (file of results|result); move the file away"):
            serve(*flags)
        assert results.read_bytes() == text
    lines = uncut.split(b"\n")
    for damaged in (lines[1][:20], b"\x00" * 9 + lines[1], b"[" * 100_000,
                    lines[1][:30] + lines[2]):
        results.write_bytes(b"\n".join([lines[0], damaged, *lines[2:]]))
        serve(*flags)
        assert sorted(results.read_bytes().splitlines()) == sorted(lines[:-1])
        printed = capsys.readouterr().err
        assert "line 2 is damaged; it is done again" in printed
        assert "1 requests, 0 failed" in printed
    for cut in (b"", b'{"li', lines[0][:40], lines[0]):   # killed within the first line
        results.write_bytes(cut)
        serve(*flags)
        assert sorted(results.read_bytes().splitlines()) == sorted(lines[:-1])


def test_a_second_start_a_kill_and_a_full_disk_lose_nothing(tiny_requests, tmp_path):
    _, results, flags = tiny_requests
    requests = [dict(prompt="x" * (i % 15), max_new_tokens=5) for i in range(150)]
    write_jsonl(tmp_path / "in.jsonl", requests)
    process = Started("generate", *flags)
    while not (results.exists() and results.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(BadInput, match="--results .*out.jsonl: another process is writing there"):
        serve(*flags)
    process.kill()
    process.communicate()
    kept = results.read_bytes()
    kept = kept[:kept.rindex(b"\n") + 1]
    process = Started("generate", *flags)
    full = max(len(kept) + 2000, 4096)   # what it writes to see that it can
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (full, full))
    status, printed = process.communicate()
    assert status == 2 and "Traceback" not in printed, printed
    assert "cannot be written (File too large); the results in it are kept" in printed
    assert results.read_bytes().startswith(kept) and results.read_bytes().endswith(b"}\n")
    serve(*flags)
    rows = rows_of(results)
    assert sorted(rows) == list(range(1, 151)) and len(results.read_text().splitlines()) == 150
    assert results.read_bytes().startswith(kept)
    assert all(row["error"] is None for row in rows.values())
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".tmp", ".lock"))]


def test_an_interrupted_run_says_how_to_go_on_and_goes_on(tiny_requests, capsys, monkeypatch):
    lines, results, flags = tiny_requests
    command = ["python", "generate.py", *map(str, flags)]
    monkeypatch.setattr(sys, "orig_argv", command)
    step, calls = generate.Engine.step, []

    def interrupted_step(engine):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(engine)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(generate.Engine, "step", interrupted_step)
        run_main(lambda: serve(*flags, "--slots", 2))
    told = [line for line in capsys.readouterr().err.splitlines() if "go on with" in line]
    assert told == [f"interrupted; what has ended is kept in {results}; go on with: "
                    f"{sys.executable} {' '.join(command[1:])}"]
    done = rows_of(results)
    assert 0 < len(done) < len(lines)
    serve(*flags)
    assert len(rows_of(results)) == len(lines) and done.items() <= rows_of(results).items()


def test_results_go_to_pipes_and_links_as_they_stand(tiny_requests, tmp_path):
    _, results, flags = tiny_requests
    serve(*flags)
    expected = sorted(results.read_text().splitlines())
    run = script("generate.py", *replaced(flags, "--results", "/dev/stdout"))
    assert run.returncode == 0 and sorted(run.stdout.splitlines()) == expected, run.stderr
    reader, writer = os.pipe()
    serve(*replaced(flags, "--results", f"/dev/fd/{writer}"))
    os.close(writer)
    with open(reader) as pipe:
        assert sorted(pipe.read().splitlines()) == expected
    serve(*replaced(flags, "--results", "/dev/null"))
    assert Path("/dev/null").is_char_device()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "r.jsonl")
    serve(*replaced(flags, "--results", tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert sorted((tmp_path / "elsewhere" / "r.jsonl").read_text().splitlines()) == expected
    with pytest.raises(BadInput, match="in.jsonl: line 1 is not a result"):   # the requests
        serve(*replaced(flags, "--results", tmp_path / "in.jsonl"))


BAD = [   # what follows "prompt" in a request, and why it fails
    ('"smile \\ud83d"', "half of a surrogate pair"),
    ('"a", "seed": 99999999999999999999', "seed is 9999"),
    ('"a", "seed": -1', "seed is -1"),
    ('"a", "seed": 1' + "0" * 5000, "seed is inf, which is no whole number"),
    ('"a", "top_k": 99999999999999999999', "top_k is 9999"),
    ('"a", "temperature": 1' + "0" * 400, "temperature is 1000"),
    ('"a", "temperature": 1e999', "temperature is inf"),
    ('"a", "temperature": NaN', "temperature nan"),
    ('"a", "max_new_tokens": 0', "max_new_tokens is 0"),
    ('"a", "max_new_tokens": "9"', "max_new_tokens is '9', which is no whole number"),
    ('"a", "stop": [""]', "which is no list of texts"),
    ('"a", "adapter": ["x"]', "adapter is .'x'., which is no text"),
    ('"a", "adapter": "gone.safetensors"', "gone.safetensors: no such adapter file"),
    ('7', "prompt is 7, which is no text")]


@pytest.mark.parametrize("bad,sentence", BAD, ids=[sentence for _, sentence in BAD])
def test_a_request_that_cannot_be_run_fails_alone(bad, sentence, tiny_requests, tmp_path, capsys):
    lines, results, flags = tiny_requests
    serve(*flags)
    alone = rows_of(results)
    text = (tmp_path / "in.jsonl").read_text()
    (tmp_path / "in.jsonl").write_text(f'{text}{{"prompt": {bad}}}\n{json.dumps(lines[0])}\n')
    serve(*flags)
    rows = rows_of(results)
    assert re.search(sentence, rows[7]["error"]) and len(rows[7]["error"]) < 300
    assert rows[7]["tokens"] == []
    assert rows[8]["tokens"] == rows[1]["tokens"] and {i: rows[i] for i in alone} == alone
    serve(*flags)
    printed = capsys.readouterr().err
    assert "2 requests, 1 failed" in printed and "0 requests" in printed


def test_lines_without_a_seed_draw_apart_and_can_be_drawn_again(tiny_folder, tmp_path, monkeypatch):
    file, results = write_jsonl(tmp_path / "in.jsonl", 4 * [{"prompt": "int a", "temperature": 1.0}]), []
    for i, more in enumerate(([], ["--slots", 1], ["--seed", 1])):
        out = tmp_path / f"{i}.jsonl"
        run_script(generate.main, ["generate.py", "--weights", tiny_folder, "--requests", file, "--results", out,
                                   "--max-new-tokens", 12, *more], monkeypatch)
        rows = sorted(map(json.loads, out.read_text().splitlines()), key=lambda row: row["line"])
        results.append([tuple(row["tokens"]) for row in rows])
    assert len(set(results[0] + results[2])) == 8 and results[0] == results[1]
