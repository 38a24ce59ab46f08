"""extras/gpu.py: rehearsed on a CPU with tiny sizes; what it makes of parts that fail, and of figures."""
import importlib
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from extras import gpu
from extras.gpu import Part
from plumbing import timing
from plumbing.files import read_json
from plumbing.flags import run_main
from plumbing.tests.started import Started
from test_flora import HERE, run_script

PARTS = ["tests", "tokens", "graphs", "fig2-1b", "fig2-15b", "free-2", "free-4", "training", "memory"]


def run_here(command, **settings):
    """In the place of subprocess.run: what Python would run, in this process; pytest alone in its own."""
    _, *words = command
    name, *sys.argv[1:] = words[words[0] == "-m":]
    if name == "pytest":
        return SimpleNamespace(returncode=Started(name, *sys.argv[1:]).communicate()[0])
    run_main(importlib.import_module(name.removesuffix(".py")).main)
    return SimpleNamespace(returncode=0)


def test_all_parts_run_in_a_rehearsal(tmp_path, monkeypatch, capsys):
    """Each by its own command, but for speed in this process, and what --compile compiles without
    C++: by the passes that trace and rewrite it. `python -m extras.gpu --rehearse` leaves out nothing."""
    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(run=run_here, TimeoutExpired=subprocess.TimeoutExpired))
    monkeypatch.setattr(timing, "BYTES", 1 << 20)
    monkeypatch.chdir(HERE)   # where it goes itself
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    run_script(gpu.main, ["gpu", "--rehearse", "--out", tmp_path], monkeypatch)
    printed = capsys.readouterr().out
    data = read_json(tmp_path / "gpu.json")
    assert list(data["parts"]) == PARTS and data["rehearsal"]
    assert data["parts"]["tests"]["passed"] == 8
    assert data["parts"]["tokens"]["same"] == {"graphs": 14, "graphs, compiled": 14, "the CPU's engine": 14}
    assert data["parts"]["graphs"]["milliseconds"].keys() == {"base", "flora r1"}
    assert data["parts"]["training"]["tokens_per_second"].keys() >= {"flora", "lora", "ia3"}
    said = "\n".join(line["what"] for line in data["verdicts"])
    for part in ["fig2-15b, rank 2: FLoRA has ", "fig2-1b, Eq. 7: ", "free rank, 4 requests: ", "15B on int8: ", "GB/s",
                 "tests on CUDA: 8 passed", "CUDA graphs, tiny, 2 requests, flora r1"]:
        assert part in said, part
    for line in data["verdicts"]:
        assert f"{line['verdict']:>13}  {line['what']}" in printed


def run(monkeypatch, tmp_path, parts, *flags):
    """Run with other parts -> gpu.json, the exit status."""
    monkeypatch.setattr(gpu, "parts_of", lambda args: parts)
    monkeypatch.chdir(HERE)   # where it goes itself
    status = 0
    try:
        run_script(gpu.main, ["gpu", "--rehearse", "--out", tmp_path, *flags], monkeypatch)
    except SystemExit as e:
        status = e.code
    return read_json(tmp_path / "gpu.json"), status


def tokens_part(tmp_path, name="tokens", seconds=1):
    found = '{"requests": 2, "same": {"graphs": 2, "graphs, compiled": "RuntimeError: no compiler"}}'
    return Part(name, seconds, ["-c", f"open({str(tmp_path / f'{name}.json')!r}, 'w').write({found!r})"])


def test_a_part_that_fails_or_hangs_costs_no_other(monkeypatch, tmp_path, capsys):
    """gpu.json is there after each one: the hanging part finds it."""
    wait = f"import os, time; assert os.path.exists({str(tmp_path / 'gpu.json')!r}); time.sleep(600)"
    data, status = run(monkeypatch, tmp_path, [
        Part("training", 0, ["-c", "raise SystemExit(3)"]), Part("memory", 0, ["-c", "pass"]), tokens_part(tmp_path, seconds=0),
        Part("graphs", 0, ["-c", wait]), Part("fig2-1b", 5, ["-c", "pass"])], "--minutes", "0.03")
    assert status == 1
    assert [data["parts"][name].get("not_run", "ran") for name in data["parts"]][:3] == [
        "ended with status 3", "wrote nothing", "ran"]
    assert data["parts"]["graphs"]["not_run"].startswith("stopped after ")
    assert data["parts"]["fig2-1b"]["not_run"] == "--minutes 0.03 leaves no room for it"
    lines = [(line["verdict"], line["what"]) for line in data["verdicts"]]
    assert lines[:2] == [("holds", "graphs: the plain engine's tokens in 2 of 2 requests, float32"),
                         ("DOES NOT HOLD", "graphs, compiled: RuntimeError: no compiler")]
    assert ("not run", "training: ended with status 3") in lines


def test_parts_are_left_out_from_the_end(monkeypatch, tmp_path):
    data, status = run(monkeypatch, tmp_path, [tokens_part(tmp_path), tokens_part(tmp_path, "graphs", 10_000),
                                               tokens_part(tmp_path, "training")])
    assert status == 1
    assert ["not_run" in part for part in data["parts"].values()] == [False, True, True]


def test_what_the_figures_say():
    row = dict(ratio_to_base=0.9, decoding_step_seconds=0.02)
    rows = [row | dict(baseline=name, rank=rank, tokens_per_second=speed) for name, rank, speed in
            [("base", None, 100.0), ("flora", 1, 96.0), ("flora", 2, 60.0), ("lora-token", 1, 30.0),
             ("lora-token", 2, 30.0)]]
    data = dict(rows=rows, eq7=dict(predicted=dict(inflection_rank=None), measured={"lora-token": 8.0}),
                limits=dict(decode_share_of_bandwidth=0.4, decode_ms=40.0, bandwidth_gb_s=3350.0,
                            prefill_share_of_matmul=0.7, matmul_gflop_s=900e3),
                free_rank=dict(requests=32, predicted=9.0, measured=dict(flora=[1, 2])))
    assert gpu.verdicts({"fig2-15b": data, "free-32": data}) == [
        (True, "fig2-15b, rank 1: FLoRA has 3.20 times the tokens/s of LoRA by bmm per token, in the paper 3.0 at "
               "least; 0.90 of the base's"),
        (False, "fig2-15b, rank 2: FLoRA has 2.00 times the tokens/s of LoRA by bmm per token, in the paper 2.5 at "
                "least; 0.90 of the base's"),
        (None, "fig2-15b, Eq. 7: FLoRA is ahead up to rank infinity, measured: 8.0 against lora-token"),
        (None, "fig2-15b: decoding reads at 80% of 3,350 GB/s, prefill computes at 70% of 900.0 TFLOP/s"),
        (True, "free rank, 32 requests: 9.0 predicted, FLoRA keeps 0.97 of the base at 1, 2")]
    for predicted, found in [(1.0, [1, 2]), (4.0, [1])]:   # one too many is free, one too few
        free = dict(requests=8, predicted=predicted, measured=dict(flora=found))
        assert gpu.of_free_rank("", data | dict(free_rank=free))[0][0] is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: with one it would run")
def test_without_a_gpu_it_says_what_can_be_had(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(HERE)
    with pytest.raises(SystemExit) as stop:
        run_script(gpu.main, ["gpu", "--out", tmp_path], monkeypatch)
    assert stop.value.code == 2 and "no GPU that torch can use here; --rehearse runs" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run_script(gpu.main, ["gpu", "--rehearse", "--minutes", "0", "--out", tmp_path], monkeypatch)
    assert stop.value.code == 2 and "--minutes is 0.0; use a number above 0" in capsys.readouterr().err
