"""What the tests of plumbing/ share: the fixtures of test_flora.py, and how commands are run."""
import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.register_assert_rewrite("test_flora")

from plumbing.flags import run_main  # noqa: E402
from test_flora import (HERE, adapter, embedded_adapters, family, golden, kind,  # noqa: E402, F401
                        mixed, model, name, served, served_model, tiny, tiny_folder)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_here("bench.py", flag, ...): a script in this process, as `script` runs it in another."""
    def run(name, *args, cwd=None):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        with monkeypatch.context() as patch:
            patch.chdir(cwd or os.getcwd())
            capsys.readouterr()
            try:
                status = run_main(importlib.import_module(name.removesuffix(".py")).main) or 0
            except SystemExit as e:
                status = e.code
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=printed.out, stderr=printed.err)
    return run


def script(name, *args, cwd=None):
    """A script in a process of its own."""
    command = [sys.executable, os.path.join(HERE, name), *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def write_jsonl(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def served_folder(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    served_model([], family).save_pretrained(folder)
    return folder
