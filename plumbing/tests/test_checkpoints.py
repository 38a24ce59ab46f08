"""Checkpoints and processes of a training."""
import argparse
import contextlib
import io
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from plumbing.checkpoints import load_checkpoint
from plumbing.files import BadInput
from plumbing.flags import run_main
from plumbing.tests.started import Started
from test_flora import HEADERS, HERE, run_script, run_train, tiny_flags


def start_train(*args):
    return Started("train", *tiny_flags(*args))


@pytest.fixture(params=[(signal.SIGKILL, "flora"), (signal.SIGINT, "lora")],
                ids=["kill", "interrupt"])
def ending(request):
    """How a training ends too early, and the kind of its adapter."""
    return request.param


def flags_of(kind):
    """Of the trainings that are cut short, and of the one that is not."""
    return ["--steps", 100, "--rank", 2, "--adapter", kind]


WHOLE = {}   # {(folder, kind): the report of the training that nothing cuts short}


def whole_run(folder, out, kind):
    if (folder, kind) not in WHOLE:
        WHOLE[folder, kind] = run_train(folder, out / "whole", *flags_of(kind))
    return WHOLE[folder, kind]


def killed(folder, out, *flags):
    """A training killed once it has a checkpoint -> (its exit status, what it printed)."""
    process = start_train(folder, out, *flags)
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    return process.communicate()


def interrupted(folder, out, *flags):
    """As `killed`, in this process and by Ctrl-C."""
    printed, save = io.StringIO(), train.save_checkpoint

    def save_and_interrupt(step, *rest):
        save(step, *rest)
        if step == 10:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(train, "save_checkpoint", save_and_interrupt)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            run_script(train.main, ["train.py", *tiny_flags(folder, out, *flags)], patch)
    return exit.value.code, printed.getvalue()


def test_a_killed_or_interrupted_run_resumes_with_the_losses_of_an_uninterrupted_one(
        ending, tiny_folder, tmp_path):
    how, kind = ending
    flags = flags_of(kind)
    cut_short = interrupted if how == signal.SIGINT else killed
    status, printed = cut_short(tiny_folder, tmp_path / "cut", *flags)
    step = load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["step"]
    assert 10 <= step < 100 and "Traceback" not in printed
    assert status == (130 if how == signal.SIGINT else -signal.SIGKILL)
    if how == signal.SIGINT:
        assert f"interrupted at step {step}; go on with:" in printed and "--resume" in printed
    with pytest.raises(BadInput, match=f"is an unfinished run at step {step}; add --resume"):
        run_train(tiny_folder, tmp_path / "cut", *flags)
    with pytest.raises(BadInput, match="was made with --seed 0, not 5; give the same flags"):
        run_train(tiny_folder, tmp_path / "cut", *flags, "--resume", "--seed", 5)
    resumed = run_train(tiny_folder, tmp_path / "cut", *flags, "--resume")
    whole = whole_run(tiny_folder, tmp_path, kind)
    after_cut = {p["step"]: p["heldout_loss"] for p in resumed["log"]}
    assert {p["step"]: after_cut[p["step"]] for p in whole["log"]} == pytest.approx(
        {p["step"]: p["heldout_loss"] for p in whole["log"]}, abs=1e-6)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
        tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "learning_rate", lambda step, args: 1e-3 if step < 20 else 1e30)
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny_flags(tiny_folder, tmp_path)])
    with pytest.raises(SystemExit) as exit:
        run_main(train.main)
    assert exit.value.code == 1
    sentence = ("loss is (nan|inf) at step 2[12]; "
                "the last good checkpoint is kept in .*checkpoint.pt; lower --lr")
    assert re.search(sentence, capsys.readouterr().err)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    assert checkpoint["step"] == 20
    assert all(t.isfinite().all() for t in checkpoint["trained"].values())


def test_an_interrupted_run_says_how_to_go_on_with_resume_once(
        tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "interrupts", lambda: contextlib.nullcontext(torch.ones(1)))
    for step, flags in [(1, []), (2, ["--resume"])]:
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        with pytest.raises(KeyboardInterrupt):
            run_train(tiny_folder, tmp_path, *flags)
        told = f"interrupted at step {step}; go on with: {sys.executable} train.py --resume\n"
        assert told in capsys.readouterr().out


TWO = ["--grad-accum", 2, "--steps", 20]


def test_two_processes_give_the_losses_of_one(tiny_folder, tmp_path):
    flags = tiny_flags(tiny_folder, tmp_path / "two", *TWO, "--adapter", "flora")
    ran = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc-per-node=2", HERE / "train.py", *flags],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ran.returncode == 0, ran.stdout
    check_two_processes("flora", tiny_folder, tmp_path)


def check_two_processes(kind, folder, out):
    flags = [*TWO, "--adapter", kind]
    two = json.loads((out / "two" / "log.json").read_text())
    one = run_train(folder, out / "one", *flags)
    for a, b in zip(two["log"], one["log"], strict=True):
        assert a["heldout_loss"] == pytest.approx(b["heldout_loss"], abs=1e-4)


def test_a_second_start_is_refused_and_a_full_disk_keeps_the_last_good_checkpoint(
        tiny_folder, tmp_path):
    flags, checkpoint = flags_of("flora"), tmp_path / "cut" / "checkpoint.pt"
    process = start_train(tiny_folder, tmp_path / "cut", *flags)
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(BadInput, match="--out .*cut: another process is writing there"):
        run_train(tiny_folder, tmp_path / "cut", *flags, "--resume")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    process.send_signal(signal.SIGCONT)
    status, printed = process.communicate()
    assert status == 2 and "Traceback" not in printed, printed
    assert "cannot be written (File too large)" in printed
    assert "the last good checkpoint is kept in" in printed
    assert load_checkpoint(checkpoint)["step"] >= 10
    resumed = run_train(tiny_folder, tmp_path / "cut", *flags, "--resume")
    uncut = whole_run(tiny_folder, tmp_path, "flora")
    assert [p["heldout_loss"] for p in resumed["log"]] == [p["heldout_loss"] for p in uncut["log"]]
    assert not list(tmp_path.rglob("*.tmp"))


def test_resume_tells_bases_and_data_apart_by_their_contents(
        tiny_folder, tmp_path, monkeypatch, capsys):
    data, other = tmp_path / "data", tmp_path / "other"
    data.mkdir()
    for i, file in enumerate(sorted(Path(HEADERS).parent.glob("*.h"))[:12]):
        shutil.copy(file, data / f"{i}.h")
    shutil.copytree(tiny_folder, other)
    tensors = load_file(other / "model.safetensors")
    next(iter(tensors.values())).view(-1)[1] += 1   # one weight of the base
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    flags = [tiny_folder, tmp_path / "out", "--steps", 4, "--adapter", "lora"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "over_processes", lambda loss, asked: (loss.item(), True))
        run_train(*flags, "--data", data)
    shutil.copytree(data, tmp_path / "moved")
    (data / "0.h").write_text("int changed;\n" * 50)
    moved = [*flags, "--data", tmp_path / "moved", "--resume"]
    for more, sentence in [
            (["--data", data], "made with other data"),
            (["--weights", other], "made with another base model"),
            (["--eval-tokens", 99], "made with --eval-tokens 500, not 99"),
            (["--clip", 2], ".*--clip 1.0, not 2.0"),
            (["--dtype", "bfloat16"], "made with --dtype float32, not bfloat16"),
            (["--lr", 1], "made with --lr 0.001, not 1.0")]:
        with pytest.raises(BadInput, match=f"checkpoint.pt was {sentence}"):
            run_train(*moved, *more)
    file = tmp_path / "out" / "checkpoint.pt"
    checkpoint = load_checkpoint(file)
    assert run_train(*moved)["log"][-1]["step"] == 4
    # as earlier versions wrote it
    for name in ("base", "data", "lora", "clip", "dtype", "eval_tokens"):
        del checkpoint["args"][name]
    checkpoint["args"]["data"] = [str(tmp_path / "moved")]
    torch.save(checkpoint, file)
    capsys.readouterr()
    assert run_train(*moved)["log"][-1]["step"] == 4
    assert "is not checked" in capsys.readouterr().out


def test_a_run_draws_by_its_seed_its_step_and_its_micro_step(tiny_folder, tmp_path):
    def drawn(seed, step, micro):
        args = argparse.Namespace(seed=seed, block_size=8, batch_size=4)
        return tuple(train.batch(np.arange(10_000), args, step, micro)[0].flatten().tolist())

    one = drawn(0, 1, 0)
    assert one == drawn(0, 1, 0) and len(set(one)) > 8
    assert len({one, drawn(1, 1, 0), drawn(0, 2, 0), drawn(0, 1, 1), drawn(0, 0, 1)}) == 5
    adapters = {seed: run_train(tiny_folder, tmp_path / str(seed), "--steps", 0, "--adapter",
                                "lora", "--seed", seed)["adapter_file"] for seed in (0, 1)}
    first, second = (load_file(file) for file in adapters.values())
    assert any(not torch.equal(first[name], second[name]) for name in first)   # where it starts
