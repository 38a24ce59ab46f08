"""Serving beside other engines: what can be tested without them."""
import ast
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch

import flora
import model
from extras import llama_cpp, peers, peers_engines, peers_rows, results
from generate import generate
from model import GPT
from plumbing.files import BadInput, read_json
from plumbing.outputs import write_json
from test_flora import CONFIGS, HERE, TINY, run_script, tiny_model


@pytest.fixture(params=["gpt_bigcode"])
def args(request, tmp_path, monkeypatch):
    monkeypatch.setitem(model.PRESETS, "tiny", CONFIGS[request.param])
    return peers.parse_args(["--folder", str(tmp_path / "peers"), "--model", "tiny", "--requests", "3",
                             "--ranks", "1", "2", "--prompt", "5", "--new", "6", "--repeats", "3"])


@pytest.mark.parametrize("args", ["gpt_bigcode", "llama"], indirect=True)
def test_our_rows_give_each_request_the_tokens_of_its_folder_alone(args):
    peers.prepare(args)
    prompts = torch.randint(1, 300, (3, 5)).tolist()
    tokens = {row: run() for row, run in peers_rows.our_rows(args, prompts).items()}
    base = GPT.from_pretrained(f"{args.folder}/model")
    expected = {"base": generate(base, prompts, max_new_tokens=6)}
    for kind, rank in peers_rows.kinds_and_ranks(args):
        places = peers_rows.places(args, kind, rank)
        ids = [flora.load_adapter(base, str(place)) for place in places]
        alone = [generate(base, [prompt], [i], max_new_tokens=6)[0] for prompt, i in zip(prompts, ids)]
        expected[f"{peers_rows.NAMES[kind]} r{rank}"] = alone
        assert alone != expected["base"]
        targets = json.loads((places[0] / "adapter_config.json").read_text())["target_modules"]
        assert targets == {"gpt_bigcode": ["attn.c_attn"], "llama": [
            "self_attn.q_proj", "self_attn.v_proj"]}[base.config.model_type]
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
    file = peers_rows.places(args, "flora", 2)[1] / "adapter_model.safetensors"
    made = file.read_bytes()
    args.seed = 7
    peers.prepare(args)
    assert file.read_bytes() == made
    args.model = "starcoder-cpu"
    with pytest.raises(BadInput, match="holds another model than starcoder-cpu; use another --folder"):
        peers.prepare(args)


def test_an_engine_that_is_missing_is_skipped_by_name_but_not_the_reference(args, monkeypatch, capsys):
    peers.prepare(args)
    args.vllm_python = f"{args.folder}/none"
    for name in ("ctranslate2", "xllamacpp", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadInput, match="transformers is not installed, and nothing is timed before"):
        peers.all_rows(args, [[1]])
    monkeypatch.setitem(sys.modules, "gguf", torch)   # something that can be imported
    monkeypatch.setattr(peers, "transformers_rows", lambda *_: {})
    monkeypatch.setattr(peers_rows, "version", lambda package: "1.0")
    rows, versions = peers.all_rows(args, [[1]])
    assert {engine for engine, _, _ in rows} == {"this"} and list(versions) == ["transformers", "peft"]
    assert capsys.readouterr().out.splitlines() == [
        "CTranslate2: skipped, as ctranslate2 is not installed",
        "llama.cpp: skipped, as xllamacpp is not installed",
        "llama.cpp-LoRA: skipped, as xllamacpp is not installed",
        f"vLLM: skipped, as there is no {args.folder}/none"]


def test_engines_are_those_that_are_named_and_each_of_them_must_be_there(args, monkeypatch):
    monkeypatch.setattr(peers, "our_rows", lambda *_: {})
    monkeypatch.setattr(peers, "transformers_rows", lambda *_: {})
    monkeypatch.setattr(peers, "versions", lambda *_: {})
    fakes = {name: lambda *_, name=name: ({(name, "base", "int8"): list}, {name: "1"})
             for name in peers.OTHERS}
    monkeypatch.setattr(peers, "OTHERS", fakes)
    assert len(peers.all_rows(args, [])[0]) == 4
    args.engines = ["vLLM", "CTranslate2"]
    assert peers.all_rows(args, []) == (
        {("vLLM", "base", "int8"): list, ("CTranslate2", "base", "int8"): list},
        {"vLLM": "1", "CTranslate2": "1"})
    args.engines = []
    assert peers.all_rows(args, []) == ({}, {})
    args.engines, fakes["llama.cpp"] = ["llama.cpp"], peers_rows.llama_cpp_rows
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BadInput, match="^--engines llama.cpp: gguf is not installed$"):
        peers.all_rows(args, [])
    monkeypatch.setitem(sys.modules, "gguf", torch)
    monkeypatch.setitem(sys.modules, "xllamacpp", torch)
    args.model = "llama-smollm2"
    with pytest.raises(BadInput, match="^--engines llama.cpp: .* writes StarCoders alone$"):
        peers.all_rows(args, [])


BASE, OURS_BF16, FAST = (("this", "base", "float32"), ("this", "FLoRA r8", "bfloat16"),
                         ("other", "base", "float32"))
RIVAL, THEIRS_BF16, THEIRS_R1, WRONG = (
    ("transformers", "base", "float32"), ("transformers + PEFT", "LoRA r8", "bfloat16"),
    ("transformers + PEFT", "LoRA r1", "bfloat16"), ("wrong", "base", "float32"))
TURNS = [THEIRS_R1, OURS_BF16, THEIRS_BF16, BASE, RIVAL, FAST]   # those compared, side by side
WEATHER = [1, 4, 1, 2, 8, 1, 2]   # how slow the machine is in each round, to all rows


def slowness(row, i):
    """Of a row in round i, beside our base. FAST's ratios to it are 1/1 ... 1/7, out of order."""
    return {BASE: 1, FAST: [4, 2, 7, 1, 3, 6, 5][i], RIVAL: 3, OURS_BF16: 2, THEIRS_BF16: 5,
            THEIRS_R1: 7}[row]


@pytest.fixture
def timed(args, monkeypatch):
    """-> the rows in the order in which they ran, by a clock that they alone advance"""
    ran, clock = [], [0.0]

    def run(row):
        i = sum(row == other for other in ran)
        ran.append(row)
        clock[0] += WEATHER[i] * slowness(row, i)

    rows = {row: lambda row=row: run(row)
            for row in [BASE, OURS_BF16, RIVAL, THEIRS_R1, THEIRS_BF16, FAST, WRONG]}
    same = {row: [[1] * 6] * 3 for row in rows}
    same[OURS_BF16] = [[1] * 6, [1, 2] * 3, [2] * 6]
    monkeypatch.setattr(peers.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(peers, "PAUSE", 0)
    monkeypatch.setattr(peers, "all_rows", lambda *_: (rows, {"peft": "0.21"}))
    expected = dict.fromkeys(["base", "LoRA r1", "LoRA r8", "FLoRA r8"], [[1] * 6] * 3)
    monkeypatch.setattr(peers, "tokens_of", lambda *_: (same, expected))
    monkeypatch.setattr(peers, "partings", lambda *_: {WRONG: [(0, 3, 0.5)]})
    args.repeats, args.json = 7, str(args.folder) + ".json"
    return ran


def test_the_table_compares_rows_in_the_same_round(args, timed, capsys):
    """18 tokens a run, seconds WEATHER times slowness. Of seven ratios the bootstrap's median lies
    below the second lowest for 1 % of the draws and below the third for 14 %, so the interval goes
    from the second lowest to the second highest."""
    peers.compare(args)
    table = capsys.readouterr().out
    for line in ["this | base | float32 | 9.0 [2.2–18.0] | 1.00 | 3.00",
                 "other | base | float32 | 2.6 [0.8–9.0] | 0.25 [0.17–0.50] | 0.75 [0.50–1.50]",
                 "this | FLoRA r8 | bfloat16 | 4.5 [1.1–9.0] | 0.50 | 2.50 | 2.333 of 6"]:
        assert f"| {line} |" in table
    assert "\n\nwrong, base, float32, left out: other tokens in request 0 at its token 3" in table
    data = read_json(args.json)
    assert data["versions"] == {"peft": "0.21"} and data["repeats"] == 7
    other = next(row for row in data["rows"] if row["engine"] == "other")
    assert other["ratio_to_base_low"] == pytest.approx(1 / 6)
    assert other["ratio_to_peft_high"] == pytest.approx(3 / 2)


def test_a_row_is_compared_with_vllm_of_its_dtype_and_rank(args):
    row = "this", "FLoRA r1", "bfloat16"
    seconds = {BASE: [1, 1], row: [2, 4], ("vLLM", "LoRA r1", "bfloat16"): [5, 10],
               ("vLLM", "LoRA r8", "bfloat16"): [9, 9], ("vLLM", "base", "bfloat16"): [3, 3]}
    found = peers.summary(args, seconds, dict.fromkeys(seconds, [6]))
    assert [r["ratio_to_vllm"] for r in found] == [None, 2.5, 1, 1, 1]
    table = results.peers(dict(
        rows=found, model="tiny_starcoder_py", new=6, requests=3, prompt=4, repeats=2, versions={},
        notes=[]))
    assert "| of vLLM in its dtype |" in table
    line = next(line for line in table.splitlines() if line.startswith("| this | FLoRA r1"))
    assert line.endswith("|  | 2.50 | 6 of 6 |")


def test_rivals_run_side_by_side_and_every_other_round_in_reverse_order(args, timed):
    peers.compare(args)
    assert timed == TURNS + TURNS[::-1] + TURNS + TURNS[::-1] + TURNS + TURNS[::-1] + TURNS


def test_a_row_without_a_rival_has_no_ratio_to_one_and_old_data_has_no_intervals():
    row = dict(ratio_to_base=1.234, ratio_to_peft=None)
    assert results.times(row, "ratio_to_base") == "1.23"
    assert results.times(row, "ratio_to_peft") == ""


# ------------------------------------------------------------------------------------ vLLM's worker

FAKE_VLLM = '''
"""In the place of vLLM: a prompt's new tokens are its last one and the name of its LoRA's folder."""
import importlib.util
import os
from types import SimpleNamespace
__version__ = "9.9"
assert not importlib.util.find_spec("packed"), "extras/ is where modules are looked for"
print("much that it says")

class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos, detokenize):
        assert temperature == 0 and ignore_eos
        self.new = max_tokens

class LLM:
    def __init__(self, model, **settings):
        assert os.environ["HF_HUB_OFFLINE"] == "1" and not settings["enable_prefix_caching"]
        if not os.path.isdir(model):
            raise ValueError("no such model")
        self.settings = settings

    def generate(self, prompts, sampling, lora_request, use_tqdm):
        if lora_request:
            assert self.settings["max_lora_rank"] == 8 and self.settings["max_loras"] == 3
        numbers = [lora.folder for lora in lora_request or []] or [9] * len(prompts)
        return [SimpleNamespace(outputs=[SimpleNamespace(
            token_ids=(prompt["prompt_token_ids"][-1], number) * (sampling.new // 2))])
            for prompt, number in zip(prompts, numbers)]
'''
FAKE_LORA = '''
import os

class LoRARequest:
    def __init__(self, name, number, folder):
        assert os.path.isfile(f"{folder}/adapter_config.json") and number > 0, folder
        self.folder = int(os.path.basename(folder))
'''


@pytest.fixture
def fake_vllm(args, tmp_path, monkeypatch):
    for file, text in {"vllm/__init__.py": FAKE_VLLM, "vllm/lora/__init__.py": "",
                       "vllm/lora/request.py": FAKE_LORA}.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    args.vllm_python = sys.executable
    peers.prepare(args)


@pytest.mark.parametrize("args", ["gpt_bigcode", "llama"], indirect=True)
def test_vllm_decodes_in_processes_of_another_python_and_a_starcoder_without_loras(args, fake_vllm):
    prompts = [[1, 5], [2, 6], [3, 7]]
    rows, versions = peers_rows.vllm_rows(args, prompts)
    ranks = args.ranks if model.preset("tiny").model_type == "llama" else []
    assert list(rows) == [("vLLM", what, dtype) for dtype in ("float32", "bfloat16")
                          for what in ["base", *(f"LoRA r{rank}" for rank in ranks)]]
    assert versions == {"vllm": "9.9"}
    for _ in range(2):   # a worker answers line after line
        assert rows["vLLM", "base", "float32"]() == [[5, 9] * 3, [6, 9] * 3, [7, 9] * 3]
        if ranks:
            assert rows["vLLM", "LoRA r2", "bfloat16"]() == [[5, 0] * 3, [6, 1] * 3, [7, 2] * 3]
    assert "much that it says" in Path(args.folder, "vllm-float32-base.log").read_text()


def test_a_worker_takes_no_processor_time_between_its_runs_and_ends_with_its_input(args, fake_vllm):
    worker = peers_rows.Worker(args, "float32")
    for state in ("S", "T"):   # it sleeps, then it is stopped
        before = process_stat(worker.process.pid)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.process.wait(0.5)
        after = process_stat(worker.process.pid)
        assert after[0] == state and int(after[11]) + int(after[12]) <= int(before[11]) + int(before[12]) + 2
        assert worker.run([[1, 5]], 6) == [[5, 9] * 3]
    worker.process.send_signal(signal.SIGCONT)
    worker.process.stdin.close()
    assert worker.process.wait(60) == 0


def process_stat(process):
    """Linux's: the state, ..., at 11 and 12 hundredths of seconds in the program and the kernel."""
    time.sleep(0.1)
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def test_a_stopped_worker_ends_with_the_process_that_started_it(args, fake_vllm):
    parent = subprocess.run([sys.executable, "-c", f"""
import os
from argparse import Namespace
from extras.peers_rows import Worker
worker = Worker(Namespace(**{vars(args)}), "float32")
worker.run([[1, 5]], 6)
print(worker.process.pid, flush=True)
os._exit(0)
"""], capture_output=True, text=True, cwd=HERE)
    state, end = "T", time.monotonic() + 10
    with suppress(FileNotFoundError):   # of a process that has ended and been waited for
        while state != "Z" and time.monotonic() < end:
            state = process_stat(int(parent.stdout))[0]
        assert state == "Z"


def test_the_openmp_that_vllm_wants_is_loaded_first_where_it_is_installed(tmp_path):
    python, library = tmp_path / "bin" / "python", tmp_path / "lib" / "libiomp5.so"
    assert peers_rows.surroundings(str(python)) == {"PYTHONSAFEPATH": "1"}
    library.parent.mkdir()
    library.touch()
    assert peers_rows.surroundings(str(python))["LD_PRELOAD"] == str(library)


def test_a_worker_that_ends_is_told_by_its_last_line(args, fake_vllm):
    worker = peers_rows.Worker(args, "float32")
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(BadInput, match="vLLM ended, and its last line was: much that it"):
        worker.run([[1, 5]], 6)
    args.folder = f"{args.folder}/adapters"   # where no model is
    with pytest.raises(BadInput, match="its last line was: ValueError: no such model"):
        peers_rows.Worker(args, "float32")


def test_the_worker_imports_vllm_and_the_standard_library_alone():
    nodes = list(ast.walk(ast.parse(Path(peers_rows.WORKER).read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= {"vllm", *sys.stdlib_module_names}


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
