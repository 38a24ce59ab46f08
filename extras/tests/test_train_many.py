"""extras/train_many.py: each adapter as its training alone, whatever else is in the batch."""
import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flora
import train
from extras import train_many
from plumbing.checkpoints import load_checkpoint
from plumbing.files import BadInput
from plumbing.flags import run_main
from plumbing.tests.started import Started
from test_flora import random_adapter, run_script, tiny_flags, tiny_model

INCLUDE = Path(torch.__file__).parent / "include" / "c10"
DATA = {"util": f"{INCLUDE / 'util'}:.h", "core": f"{INCLUDE / 'core'}:.h .hpp", "cpp": str(INCLUDE / "macros"),
        "mine": f"{INCLUDE / 'util' / '*.h'}"}


def many_flags(folder, out, *flags, names=("util", "core")):
    shared = tiny_flags(folder, out)
    at = shared.index("--data")
    return ["--data", *(f"{name}={DATA[name]}" for name in names), *shared[:at], *shared[at + 2:], *map(str, flags)]


def run_many(*args, **names):
    """-> (reports, why others failed, train.py's args of each)."""
    runs = train_many.runs_of(*train_many.parse_args(many_flags(*args, **names)))
    return *train_many.train_many(runs)[:2], runs


def alone(args, out):
    """train.py's training of the same args, in another folder -> its report."""
    args.out = str(out)
    return train.train(args)


@pytest.mark.parametrize("family", ["gpt_bigcode", "llama"])
def test_gradients_of_one_pass_are_those_of_each_adapter_alone(family):
    """Every kind, some of a rank and length that take Eq. 4; two micro-batches."""
    kinds = [("flora", 1), ("flora", 8), ("lora", 2), ("ia3", 1), ("hira", 2), ("ffba", 2)]
    model = tiny_model(family)
    model.requires_grad_(False)
    ids = [random_adapter(model, kind, rank) for kind, rank in kinds]
    rows = [1, 3, 2, 1, 2, 2]
    x, y = torch.randint(0, 300, (2, sum(rows), 40))
    ids = [torch.full((n,), i) for n, i in zip(rows, ids)]
    batches = [(model, *part) for part in zip(x.split(rows), y.split(rows), ids)]
    for _ in range(2):
        losses = train_many.one_pass(batches, grad_accum=2)
    for (_, x, y, ids), loss in zip(batches, losses):
        parameters = flora.adapter_parameters(model, int(ids[0])).values()
        wanted = train.loss_of(model, x, y, ids)
        assert abs(wanted - loss) < 1e-5
        for parameter, gradient in zip(parameters, torch.autograd.grad(wanted, list(parameters))):
            assert (parameter.grad - gradient).abs().max() < 1e-5 * max(1, gradient.abs().max())
            assert gradient.abs().max() > 0


@pytest.mark.parametrize("steps,tolerance", [(1, 1e-5), (40, 1e-4)])
def test_files_and_losses_are_those_of_trainings_alone(steps, tolerance, tiny_folder, tmp_path):
    """Of other kinds, ranks, rates, numbers of steps and seeds, beside one another."""
    flags = ["--adapter", "flora", "lora", "hira", "--rank", 2, 1, 3, "--lr", 0.008, 0.002, 0.004,
             "--steps", steps, max(1, steps // 2), steps, "--seed", 0, 1, 0, "--grad-accum", 2, "--batch-size", 2]
    reports, failed, runs = run_many(tiny_folder, tmp_path / "many", *flags, names=["util", "core", "mine"])
    assert reports.keys() == set(runs) and not failed
    for name, args in runs.items():
        one = alone(args, tmp_path / "alone" / name)
        together, wanted = (load_file(report["adapter_file"]) for report in (reports[name], one))
        assert together.keys() == wanted.keys()
        for key in wanted:
            torch.testing.assert_close(together[key], wanted[key], atol=tolerance, rtol=0)
        for mine, other in zip(reports[name]["log"], one["log"], strict=True):
            assert mine["step"] == other["step"]
            assert mine["heldout_loss"] == pytest.approx(other["heldout_loss"], abs=tolerance)
        assert {"rank", "lr", "seed", "steps", "trainable_parameters"} <= {
            key for key in one if one[key] == reports[name][key]}
        checkpoint = load_checkpoint(tmp_path / "many" / name / "checkpoint.pt")
        assert checkpoint["step"] == args.steps
        assert json.loads((tmp_path / "many" / name / "log.json").read_text()) == reports[name]


def test_one_that_diverges_stops_alone_and_says_so(tiny_folder, tmp_path, monkeypatch, capsys):
    steady = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, args: (
        1e30 if args.out.endswith("core") and step >= 20 else steady(step, args)))
    report = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["train_many", *many_flags(tiny_folder, tmp_path / "many", "--json", report)])
    with pytest.raises(SystemExit) as exit:
        run_main(train_many.main)
    assert exit.value.code == 1
    sentence = r"loss is (nan|inf) at step 2[12]; the last good checkpoint is kept in .*core.checkpoint.pt; lower"
    assert re.search("core: the " + sentence, capsys.readouterr().err)
    written = json.loads(report.read_text())
    assert re.search(sentence, written["failed"]["core"]) and written["adapters"].keys() == {"util"}
    kept = load_checkpoint(tmp_path / "many" / "core" / "checkpoint.pt")
    assert kept["step"] == 20 and all(t.isfinite().all() for t in kept["trained"].values())
    assert not (tmp_path / "many" / "core" / "adapter.safetensors").exists()
    args = train_many.runs_of(*train_many.parse_args(many_flags(tiny_folder, tmp_path / "x")))["util"]
    wanted = load_file(alone(args, tmp_path / "alone")["adapter_file"])
    for key, tensor in load_file(tmp_path / "many" / "util" / "adapter.safetensors").items():
        torch.testing.assert_close(tensor, wanted[key], atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_killed_or_interrupted_trainings_resume_together_or_alone(how, tiny_folder, tmp_path):
    """A checkpoint is train.py's: what was begun together may go on by itself."""
    flags = ["--steps", 60, "--adapter", "flora"]
    process = Started("extras.train_many", *many_flags(tiny_folder, tmp_path / "cut", *flags))
    files = [tmp_path / "cut" / name / "checkpoint.pt" for name in ("util", "core")]
    while not all(file.exists() for file in files) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(how)
    status, printed = process.communicate()
    steps = [load_checkpoint(file)["step"] for file in files]
    assert all(10 <= step < 60 for step in steps) and "Traceback" not in printed, printed
    assert status == (130 if how == signal.SIGINT else -signal.SIGKILL)
    if how == signal.SIGINT:
        assert f"interrupted at step {steps[0]}; go on with: {sys.executable} -m extras.train_many" in printed
    with pytest.raises(BadInput, match="is an unfinished run at step .*; add --resume"):
        run_many(tiny_folder, tmp_path / "cut", *flags)
    whole = run_many(tiny_folder, tmp_path / "whole", *flags)[0]
    if how == signal.SIGKILL:
        resumed = run_many(tiny_folder, tmp_path / "cut", *flags, "--resume")[0]
    else:
        runs = train_many.runs_of(*train_many.parse_args(many_flags(tiny_folder, tmp_path / "cut", *flags, "--resume")))
        resumed = {name: train.train(args) for name, args in runs.items()}
    for name in whole:
        after_cut = {p["step"]: p["heldout_loss"] for p in resumed[name]["log"]}
        for point in whole[name]["log"]:
            assert after_cut[point["step"]] == pytest.approx(point["heldout_loss"], abs=1e-5)


@pytest.mark.parametrize("flags,sentence", [
    (["--data", "cpp=a", "cpp=b"], "--data names cpp twice"),
    (["--data", "rust"], "--data rust: use NAME=PATH, NAME='PATH:.EXT .EXT', or one of cpp, cuda, cmake, pyi"),
    (["--data", "../x=a"], "--data ../x=a: use NAME=PATH"),
    (["--data", "a=a", "--adapter", "none"], "extras.train_many trains adapters; --adapter none"),
    (["--data", "a=a", "--compile"], "--compile are train.py's alone"),
    (["--data", "a=a", "--fast"], "--fast is train.py's alone"),
    (["--data", "a=/no/such", "--block-size", "32"], "--data /no/such: no such file, folder or glob match"),
])
def test_bad_input_is_one_sentence_and_exit_status_2(flags, sentence, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_many", *flags, "--weights", str(tiny_folder), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        run_main(train_many.main)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("train_many: error: ") and sentence in error


def test_as_many_values_as_adapters_or_one(capsys):
    with pytest.raises(SystemExit):
        train_many.parse_args(["--data", "cpp", "cuda", "cmake", "--lr", "1", "2"])
    assert "--lr has 2 values; give one, or one for each of the 3 in --data" in capsys.readouterr().err
    args, shared = train_many.parse_args(["--data", "cpp", "cuda", "--rank", "1", "4", "--lr", "0.5", "--clip", "2"])
    runs = train_many.runs_of(args, shared)
    assert [(a.rank, a.lr, a.clip, a.ext) for a in runs.values()] == [
        (1, 0.5, 2.0, [".h", ".hpp"]), (4, 0.5, 2.0, [".cuh", ".cu"])]


def test_speed_compares_with_one_adapter_of_the_same_round(tmp_path, monkeypatch, capsys):
    """Tokens/s of 1 and of 2 adapters in three rounds, after a run that is not counted."""
    answers = iter([(1.0, 0), (100.0, 2**20), (50.0, 2**21), (10.0, 2**20), (20.0, 2**21),
                    (40.0, 2**20), (60.0, 2**21)])
    monkeypatch.setattr(train_many, "measure", lambda *_: next(answers))
    flags = ["train_many", "--speed", "2", "--rows", "4", "--json", tmp_path / "many.json"]
    run_script(train_many.main, flags, monkeypatch)
    assert ("| 4 | 1 | 40.0 [10.0–100.0] | 1.00 | 1 MiB |\n"
            "| 4 | 2 | 50.0 [20.0–60.0] | 1.50 | 2 MiB |") in capsys.readouterr().out   # 0.5, 2, 1.5
    assert json.loads((tmp_path / "many.json").read_text())["rows"][1]["ratio_to_alone"] == 1.5


def test_a_run_that_fails_ends_speed_in_a_sentence(tmp_path):
    with pytest.raises(BadInput, match="--speed: 2 adapters of 1 rows ended with status 2 .*--steps is -1"):
        train_many.measure(1, 2, DATA["util"], ["--steps", "-1"], tmp_path)
