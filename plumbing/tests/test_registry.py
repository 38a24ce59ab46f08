"""The look-up of extras by name: the core works without them."""
import json
import os
import shutil
import subprocess
import sys

import flora
from test_flora import FIXTURES, HERE, tiny_flags

DRIVER = """
import shlex, sys, importlib
from plumbing.flags import run_main
for line in sys.stdin:
    script, *sys.argv[1:] = shlex.split(line)
    sys.argv[0] = f"{script}.py"
    try:
        run_main(importlib.import_module(script).main)
    except SystemExit as e:
        print("exit status", e.code, file=sys.stderr)
"""


def test_the_core_is_complete_without_extras(tiny_folder, tmp_path):
    """A copy without the folder trains, generates and measures; what extras/ would add is refused
    in a sentence that names the file. (.ci/run tests such a copy by all of test_flora.py.)"""
    core = tmp_path / "core"
    core.mkdir()
    for file in HERE.glob("*.py"):
        shutil.copy(file, core)
    for folder in ("base", "fixtures", "plumbing"):
        (core / folder).symlink_to(HERE / folder)
    train = " ".join(["train", *tiny_flags(tiny_folder, "OUT", "--steps", 2)])
    lines = [train.replace("OUT", f"out/{kind}") + f" --adapter {kind}" for kind in flora.KINDS]
    files = [f"--adapter out/{kind}/adapter.safetensors" for kind in flora.KINDS]
    prompts = "--prompt 'int a' --max-new-tokens 2 --json out/generated.json"
    lines += [f"generate --weights {tiny_folder} --adapter none {' '.join(files)} {prompts}",
              f"bench --weights {tiny_folder} --ranks 1 2 --num-requests 3 --scale 0.02 --slots 2 "
              "--num-adapters 2 --repeats 1 --json out/bench.json --png out/bench.png"]
    train_x, llama_folder = train.replace("OUT", "out/x"), FIXTURES / "tiny_llama"
    refused = {
        f"{train_x} --adapter ffba": "there is no extras/ffba.py for it",
        f"{train_x} --adapter none": "--adapter none needs extras/pretrain.py",
        f"generate --weights {llama_folder} --prompt a": "there is no extras/llama.py for it",
        f"generate --weights {tiny_folder} --adapter out --prompt a": "needs extras/peft.py",
        f"generate --weights {tiny_folder} --quantize int8 --prompt a": "needs extras/int8.py",
        f"generate --weights {tiny_folder} --requests a --results b": "needs extras/requests.py",
        f"generate --weights {tiny_folder} --prompt a --adapter 'a*0.5 + b*0.5'":
            "needs extras/blend.py, which is not here",
        f"bench --weights {tiny_folder} --rows lora-masked": "needs extras/bench_more.py"}
    ran = subprocess.run([sys.executable, "-c", DRIVER], cwd=core, capture_output=True, text=True,
                         input="\n".join([*lines, *refused]),
                         env=os.environ | {"PYTHONPATH": str(core)})
    errors = ran.stderr.splitlines()
    assert ran.returncode == 0 and "Traceback" not in ran.stderr, ran.stderr
    assert errors.count("exit status 2") == len(refused), ran.stderr
    sentences = [errors[i - 1] for i, line in enumerate(errors) if line == "exit status 2"]
    for sentence, expected in zip(sentences, refused.values()):
        assert expected in sentence
    assert len(json.loads((core / "out/generated.json").read_text())) == 1 + len(flora.KINDS)
    rows = json.loads((core / "out/bench.json").read_text())["rows"]
    assert {row["baseline"] for row in rows} >= {
        "base", "ia3", "flora", "lora-example", "lora-token"}
