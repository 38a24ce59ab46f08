"""extras/requests.py: JSONL in, JSONL out, and an interrupted run that is completed."""
import json

import pytest

import flora
import generate
from extras import requests as requests_file
from flora import BASE, BadInput
from model import EMBEDDED, GPT, Tokenizer
from test_flora import script, trained, write_jsonl


def test_requests_in_results_out_and_an_interrupted_run_is_completed(tmp_path):
    """The embedded model: results equal generate()'s, a too long one fails alone, done work is kept."""
    model, tokenizer = GPT.from_pretrained(EMBEDDED), Tokenizer(EMBEDDED)
    adapter = str(tmp_path / "a.safetensors")
    flora.save_adapter(model, trained(model, flora.add_adapter(model, "flora", 2)), adapter)
    lines = [dict(prompt="def f(x):", max_new_tokens=5), dict(prompt="import ", adapter=adapter),
             dict(prompt="x " * 600),
             dict(prompt="class A", adapter=adapter, stop=["e"], temperature=0.5, seed=7)]
    requests, results = write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = ["--requests", requests, "--results", results, "--max-new-tokens", 9, "--slots", 2]
    run = script("generate.py", *command)
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
    run = script("generate.py", *command)
    assert run.returncode == 0 and "2 requests, " in run.stderr, run.stderr
    again = results.read_text().splitlines(keepends=True)
    assert again[:2] == whole[:2] and sorted(again) == sorted(whole)
    write_jsonl(requests, [dict(prompt="another")] + lines[1:])
    run = script("generate.py", *command)
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
    for flags in (["--requests", file], ["--requests", file, "--results", file, "--prompt", "x"],
                  ["--requests", file, "--results", file, "--slots", "0"]):
        with pytest.raises(SystemExit) as exit:
            generate.parse_args(list(map(str, flags)))
        assert exit.value.code == 2
