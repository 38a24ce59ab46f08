"""Damaged files and impossible flags: a right result or a BadInput, nothing else.

Seeded and bounded. A mutation replaces or removes one value of JSON, cuts or changes bytes, or puts
a folder or a pipe in the place of a file. Nothing may end in another exception, take longer than a
few seconds or more memory than HEADROOM. Whoever uses a file says what it promises of one that it
takes: mostly that what it holds is what stands there, read here in another way.
"""
import argparse
import contextlib
import copy
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bench
import flora
import generate
import train
from extras.bench_more import dataset_prompts, draw_together
from extras.passk import read_problems
from extras.peft import save_peft
from model import GPT
from plumbing.checkpoints import check_same, open_checkpoint, restore
from plumbing.files import BadInput
from plumbing.flags import run_main
from plumbing.outputs import save_figure
from plumbing.registry import extra
from plumbing.tests.conftest import write_jsonl
from plumbing.tokenizer import Tokenizer
from test_flora import FIXTURES, TINY, random_adapter, tiny_flags, tiny_model

HEADROOM = 4 << 30   # bytes of address space beyond what the process has
VALUES = [None, True, False, -1, 0, 0.5, 3, 10**9, 10**20, 1e400, float("nan"), "", "x", "0",
          [], {}, [None], [[]], {"a": 1}, ["c_attn"], -10**400, "\x00", "../x"]
DEEP = "[" * 100_000


@contextlib.contextmanager
def bounded(seconds=20):
    """An alarm and a limit on memory around what must be quick and small."""
    def stop(*_):
        raise AssertionError(f"took more than {seconds} s")
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    limits, alarm = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def mutated_json(value, rng):
    """A copy of a JSON value with one change somewhere in it, as text."""
    value = copy.deepcopy(value)
    places, todo = [], [value]
    while todo:
        node = todo.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, inner in items:
            places.append((node, key))
            if isinstance(inner, (dict, list)):
                todo.append(inner)
    how = rng.random()
    if how < 0.05:
        return rng.choice(["", "{", "null", "[]", "1", '"x"', DEEP, "\ufeff{}", "{}"])
    node, key = rng.choice(places)
    if how < 0.2 and isinstance(node, dict):
        del node[key]
    else:
        node[key] = rng.choice(VALUES)
    return json.dumps(value)


def mutated_bytes(data, rng):
    how, at = rng.randrange(6), rng.randrange(len(data))
    if how == 0:
        return data[:at]
    if how == 1:
        return b""
    if how == 2:
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    if how == 3:
        return rng.randbytes(200)
    flipped = bytearray(data)
    for _ in range(1 if how == 4 else 30):   # mostly in the header
        flipped[rng.randrange(min(len(data), 2000))] = rng.randrange(256)
    return bytes(flipped)


def damage(file, rng):
    """Change a file, or put something else in its place."""
    if rng.random() < 0.03:
        os.remove(file)
        pipe = os.mkfifo if file.name != "out.json" else os.mkdir   # results are written to a pipe
        return rng.choice([os.mkdir, pipe])(file)
    if file.suffix == ".json" and rng.random() < 0.9:
        lines = file.read_text().splitlines()
        try:
            file.write_text(mutated_json(json.loads(file.read_text()), rng), encoding="utf-8")
        except ValueError:   # a file of lines: one of them
            at = rng.randrange(len(lines))
            lines[at] = mutated_json(json.loads(lines[at]), rng)
            file.write_text("\n".join(lines), encoding="utf-8")
    elif file.suffix == ".pt" and rng.random() < 0.8:
        checkpoint = torch.load(file, weights_only=True)
        node = rng.choice([checkpoint, checkpoint["args"], checkpoint["log"][0],
                           checkpoint["trained"], checkpoint["optimizer"]])
        value = rng.choice([*VALUES, torch.ones(3), torch.ones(2, 3) * float("nan")])
        node[rng.choice(list(node))] = value
        torch.save(checkpoint, file)
    elif file.suffix == ".safetensors" and rng.random() < 0.5:
        damage_tensors(file, rng)
    else:
        file.write_bytes(mutated_bytes(file.read_bytes(), rng))


def damage_tensors(file, rng):
    """Another type, shape or value of one tensor, or other metadata, in a well-formed file."""
    with safe_open(file, "pt") as f:
        metadata = dict(f.metadata() or {})
    tensors = load_file(file)
    if "flora_adapter" in metadata and rng.random() < 0.6:
        metadata["flora_adapter"] = mutated_json(json.loads(metadata["flora_adapter"]), rng)
    else:
        name = rng.choice(sorted(tensors))
        tensor = tensors.pop(name)
        change = rng.choice([
            lambda: {name: tensor.int()},
            lambda: {name: tensor > 0},
            lambda: {name: tensor.to(torch.complex64)},
            lambda: {name: tensor.to(torch.float8_e4m3fn)},
            lambda: {name: tensor * float("nan")},
            lambda: {name: tensor * float("inf")},
            lambda: {name: tensor[:1]},
            lambda: {},
            lambda: {name: tensor[None]},
            lambda: {name: torch.zeros(0)},
            lambda: {name + "x": tensor},
            lambda: {name: tensor.half()}])
        tensors |= change()
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata or None)


def load_folder(folder):
    """The model has every number of config.json and every stored tensor, and speaks its tokens."""
    model = GPT.from_pretrained(folder)
    tokenizer = Tokenizer(folder)
    for key, value in json.loads((folder / "config.json").read_text()).items():
        if type(value) in (int, float) and hasattr(model.config, key) and "token_id" not in key:
            assert getattr(model.config, key) == value, key
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    for name, parameter in model.base_parameters().items():
        assert torch.equal(parameter, stored[name].float()) and parameter.isfinite().all(), name
    prompt = tokenizer.encode("def f(")
    new = generate.generate(model, [prompt], max_new_tokens=2, eos_id=tokenizer.eos_ids)[0]
    assert prompt and new and 0 <= min(prompt + new) <= max(prompt + new) < model.config.vocab_size


def make_adapter_file(folder):
    model = tiny_model()
    adapter_id = random_adapter(model, "flora", 2)
    flora.save_adapter(model, adapter_id, folder / "a.safetensors", {"steps": 3})


def load_adapter(folder):
    """It is finite, and what its own metadata and tensors say."""
    model, file = tiny_model(), folder / "a.safetensors"
    adapters = flora.adapters_of(model, flora.load_adapter(model, file))
    with safe_open(file, "pt") as f:
        said = json.loads(f.metadata()["flora_adapter"])
    for adapter in adapters.values():
        assert (adapter.kind, adapter.rank, adapter.alpha) == (
            said["kind"], said["rank"], said["alpha"])
    assert {a.target for a in adapters.values()} == set(said["targets"])
    assert said["base"] == model.fingerprint and math.isfinite(said["alpha"])
    assert_holds(flora.adapter_parameters(model, 1), load_file(file))


def assert_holds(parameters, stored):
    """{name: Parameter} and {name: tensor} are the same, and finite."""
    assert parameters.keys() == stored.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, stored[name].float()) and parameter.isfinite().all(), name


def load_peft_folder(folder):
    """The factors are the stored ones, scaled as adapter_config.json says."""
    model = tiny_model()
    adapters = flora.adapters_of(model, flora.load_adapter(model, folder))
    said = json.loads((folder / "adapter_config.json").read_text())
    stored, held = load_file(folder / "adapter_model.safetensors"), {}
    root = 0.5 if said.get("use_rslora") else 1
    for name, adapter in adapters.items():
        assert adapter.kind == said["peft_type"].lower() and adapter.rank == said.get("r", 8)
        assert adapter.alpha / adapter.rank == pytest.approx(
            said.get("lora_alpha", 8) / adapter.rank**root)
        held[f"base_model.model.{name}.lora_A.weight"] = adapter.B.T
        held[f"base_model.model.{name}.lora_B.weight"] = adapter.A.T
    assert_holds(held, stored)


def make_peft_folder(folder):
    model = tiny_model()
    save_peft(model, random_adapter(model, "lora", 2), folder)


def make_sharded(folder):
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3]}))


def make_run(folder):
    log = [{"step": 0, "heldout_loss": 1.5}]
    report = {"adapter": "flora", "rank": 1, "trainable_parameters": 9, "log": log}
    (folder / "log.json").write_text(json.dumps(report))


def draw_run(folder):
    """A picture is drawn."""
    extra("curves", "--plot").plot([str(folder / "log.json")], str(folder / "plot.png"))
    assert_png(folder / "plot.png")


def assert_png(file):
    assert file.read_bytes().startswith(b"\x89PNG")


MADE_WITH = {"base": "b", "steps": 3, "rank": 1}   # what the run of the checkpoint was given


def make_checkpoint(folder):
    parameters = {"h.0.A": torch.nn.Parameter(torch.ones(2, 3))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    parameters["h.0.A"].sum().backward()
    optimizer.step()
    log = [{"step": 0, "loss": None, "heldout_loss": 2.0, "seconds": 0.0}]
    torch.save(dict(step=1, trained=parameters, optimizer=optimizer.state_dict(), log=log,
                    args=MADE_WITH), folder / "checkpoint.pt")


def resume(folder):
    """The parameters, the step and the log are those of the checkpoint, whose run was given what
    this one is; none is a start at 0."""
    parameters = {"h.0.A": torch.nn.Parameter(torch.zeros(2, 3))}
    args = argparse.Namespace(out=str(folder), resume=True, made_with=MADE_WITH)
    checkpoint = open_checkpoint(args)
    if checkpoint:
        check_same(checkpoint, args)
        found = restore(checkpoint, parameters, torch.optim.AdamW(parameters.values(), lr=0.1))
        stored = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert found == (stored["step"], stored["log"])
        assert MADE_WITH | stored["args"] == MADE_WITH   # an earlier version's lacks some
        assert_holds(parameters, stored["trained"])
    else:
        assert not (folder / "checkpoint.pt").exists()


def make_lines(folder):
    lines = [{"prompt": "def f(", "adapter": "none", "max_new_tokens": 3, "stop": ["x"]},
             {"prompt": "a", "seed": 4}]
    (folder / "in.json").write_text("\n".join(map(json.dumps, lines)))


TOKENS = {}   # {a line of requests: its tokens}


def use_lines(folder):
    """Each line has a result: the tokens that such a line gets in any file, or an error of its
    own. A file that is none is a BadInput."""
    out = folder / "out.jsonl"
    out.unlink(missing_ok=True)   # earlier results would be compared, and nothing run
    argv = ["--weights", str(TINY), "--requests", str(folder / "in.json"), "--results", str(out)]
    args = generate.parse_args(argv)
    extra("requests", "--requests").serve(args)
    lines = (folder / "in.json").read_text().splitlines()
    rows = {row["line"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows.keys() == {number for number, line in enumerate(lines, 1) if line.strip()}
    for number, row in rows.items():
        tokens = (row["tokens"], row["error"])
        assert TOKENS.setdefault(lines[number - 1], tokens) == tokens
        assert row["error"] or 0 < len(row["tokens"]) <= json.loads(lines[number - 1]).get(
            "max_new_tokens", 64)


def make_results(folder):
    write_jsonl(folder / "requests.jsonl", [
        {"prompt": "a", "max_new_tokens": 2}, {"prompt": "b", "max_new_tokens": 2}])
    use_results(folder, folder / "out.json")


def use_results(folder, out=None):
    out = out or folder / "out.json"
    file = folder / "requests.jsonl"
    argv = ["--weights", str(TINY), "--requests", str(file), "--results", str(out)]
    args = generate.parse_args(argv)
    extra("requests", "--requests").serve(args)
    assert {json.loads(line)["line"] for line in out.read_text().splitlines()} == {1, 2}


def draw_conversations(folder):
    """As many as are asked for, of the paper's lengths."""
    pairs = dataset_prompts(str(folder / "shared.json"), 2, 0, None)
    assert len(pairs) == 2 and all(50 <= sum(pair) <= 2000 and min(pair) > 0 for pair in pairs)


def make_conversations(folder):
    text = "word " * 60
    entries = [{"conversations": [{"value": text}, {"value": text}, {"value": ""}]}] * 3
    (folder / "shared.json").write_text(json.dumps(entries))


def make_bench_result(folder):
    rows = [dict(mode="throughput", baseline=name, rank=rank, tokens_per_second=9.0 + rank,
                 ratio_to_base=0.9, request_rate=None)
            for name in ("flora", "lora-token") for rank in (1, 2)]
    (folder / "bench.json").write_text(json.dumps(dict(
        rows=rows, model={"name": "m"}, workload={"ranks": [1, 2]},
        eq7={"predicted": {"inflection_rank": 2.0}, "measured": {}})))


def draw_results(folder):
    """A picture is drawn."""
    draw_together([str(folder / "bench.json")], str(folder / "plot.png"))
    assert_png(folder / "plot.png")


def make_problems(folder):
    problem = {"name": "a", "language": "py", "prompt": "def f():\n", "tests": "assert f()",
               "stop_tokens": ["x"]}
    (folder / "p.json").write_text(json.dumps([problem]))


def use_problems(folder):
    """A problem is the one that stands there."""
    problems = read_problems(str(folder / "p.json"))
    stored = json.loads((folder / "p.json").read_text(encoding="utf-8-sig"))
    for problem, given in zip(problems, stored, strict=True):
        assert (problem.name, problem.prompt, problem.tests) == (
            given["name"], given["prompt"], given["tests"])
        assert problem.stops == given.get("stop_tokens", []) and problem.language == "py"


KINDS = {   # of files: how a folder of them is made, and used
    "a StarCoder folder": (lambda f: shutil.copytree(TINY, f, dirs_exist_ok=True), load_folder),
    "a Llama folder": (
        lambda f: shutil.copytree(FIXTURES / "tiny_llama3", f, dirs_exist_ok=True), load_folder),
    "shards and an index": (make_sharded, load_folder),
    "an adapter": (make_adapter_file, load_adapter),
    "a PEFT folder": (make_peft_folder, load_peft_folder),
    "a report of a run": (make_run, draw_run),
    "a checkpoint": (make_checkpoint, resume),
    "requests": (make_lines, use_lines),
    "results": (make_results, use_results),
    "conversations": (make_conversations, draw_conversations),
    "a result of bench.py": (make_bench_result, draw_results),
    "problems": (make_problems, use_problems),
}


@pytest.mark.parametrize("what", KINDS)
def test_damaged_files_give_a_right_result_or_one_sentence(what, tmp_path, monkeypatch):
    for name in ("extras.bench_more", "extras.curves"):   # small pictures, for speed
        monkeypatch.setattr(f"{name}.save_figure", lambda figure, file, **_: save_figure(figure, file, 20))
    make, use = KINDS[what]
    (tmp_path / "good").mkdir()
    make(tmp_path / "good")
    use(tmp_path / "good")
    rng = random.Random(what)
    for i in range(60):
        folder = tmp_path / f"bad{i}"
        shutil.copytree(tmp_path / "good", folder)
        read = [f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".pt")]
        file = rng.choice(sorted(read))
        damage(file, rng)
        with bounded():
            try:
                use(folder)
            except BadInput as e:
                assert len(str(e).splitlines()) == 1 and len(str(e)) < 600, f"{file}: {e}"
            except Exception as e:
                raise AssertionError(f"{file}: {type(e).__name__}: {e}") from e
        shutil.rmtree(folder)


FLAG_VALUES = ["-1", "0", "nan", "inf", "-inf", "1e400", "x", "", "99999999999999999999", "1e-400",
               "0.5"]
FLAGS = {
    train: ["--rank", "--batch-size", "--grad-accum", "--block-size", "--lr", "--warmup", "--clip",
            "--seed", "--eval-every", "--eval-tokens", "--alpha", "--targets", "--adapter",
            "--device", "--dtype", "--n-head"],
    generate: ["--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--slots",
               "--max-batched-tokens", "--adapter", "--prompt-file", "--weights", "--suffix"],
    bench: ["--ranks", "--rows", "--num-requests", "--scale", "--num-adapters", "--slots",
            "--max-batched-tokens", "--request-rate", "--repeats", "--seed", "--mode"],
}
SMALL = {
    train: lambda folder, out: tiny_flags(folder, out, "--steps", 1),
    generate: lambda folder, out: [
        "--weights", str(folder), "--prompt", "a", "--max-new-tokens", "2"],
    bench: lambda folder, out: [
        "--weights", str(folder), "--ranks", "1", "--num-requests", "2", "--scale", "0.02",
        "--num-adapters", "1", "--slots", "1", "--repeats", "1", "--rows", "ia3",
        "--mode", "throughput", "--json", f"{out}.json", "--png", f"{out}.png"],
}


def assert_ran(script, out, printed, flag, value):
    """A flag that was taken is a number that can be one, and counts; what was asked for is there."""
    assert 0 <= float(value) < float("inf")
    if script is train:
        report = json.loads((out / "log.json").read_text())
        key = flag[2:].replace("-", "_")
        assert key not in report or report[key] == float(value)
        assert all(math.isfinite(point["heldout_loss"]) for point in report["log"])
        tensors = load_file(report["adapter_file"])
        assert tensors and all(tensor.isfinite().all() for tensor in tensors.values())
    elif script is generate:
        assert printed.startswith("a") and len(printed) > 2
    else:
        rows = json.loads(out.with_suffix(".json").read_text())["rows"]
        assert {row["baseline"] for row in rows} >= {"base", "ia3"}
        assert all(0 < row["tokens_per_second"] < float("inf") for row in rows)


@pytest.mark.parametrize("script", FLAGS, ids=lambda script: script.__name__)
def test_impossible_flags_give_a_right_result_or_one_sentence(
        script, tiny_folder, tmp_path, monkeypatch, capsys):
    rng = random.Random(script.__name__)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(bench, "measure_limits", lambda *_: (1e10, 1e11))   # seconds, each time
    tried = [(flag, value) for flag in FLAGS[script] for value in rng.sample(FLAG_VALUES, 4)]
    ran = []
    for flag, value in [("--seed", "3"), *tried]:
        argv = SMALL[script](tiny_folder, tmp_path / "out") + [flag, value]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *argv])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with bounded():
            try:
                run_main(script.main)
                ran.append((flag, value))
                assert_ran(script, tmp_path / "out", capsys.readouterr().out, flag, value)
            except SystemExit as e:
                error = capsys.readouterr().err
                told = f"{flag} {value}: {e.code} {error}"
                assert e.code == 2 and "error: " in error.splitlines()[-1], told
            except Exception as e:
                raise AssertionError(f"{flag} {value}: {type(e).__name__}: {e}") from e
    assert ("--seed", "3") in ran   # what the others change is right
