"""--help of the extras' scripts: each flag says what it is and what it is when left out."""
import argparse
import importlib

import pytest

from plumbing.flags import Help
from plumbing.tests.test_flags import check_help

SCRIPTS = ["bench_engine", "demo", "figures", "gpu", "gpu_parts", "passk", "peers", "peers_engines", "peers_hira", "peers_training",
           "pretrain", "results", "table1", "toy_problems", "toys", "train_many", "whisper", "whisper_data"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_text_and_tells_its_default(script, monkeypatch):
    if script == "peers_hira":
        pytest.importorskip("peft")
    check_help(importlib.import_module(f"extras.{script}"), monkeypatch)


def test_defaults_are_told_in_words():
    parser = argparse.ArgumentParser(formatter_class=Help)
    for flag, settings in {"--a": dict(default=[1, 2]), "--b": dict(), "--c": dict(action="store_true"),
                           "--d": dict(default="5 %"), "--e": dict(required=True), "--f": dict(default=0.5)}.items():
        parser.add_argument(flag, help="what it is", **settings)
    parser.add_argument("--g", help="seconds (default: a twentieth)")
    told = parser.format_help()
    for default in ("default: 1 2", "default: none", "default: off", "default: 5 %", "required", "default: 0.5"):
        assert f"what it is ({default})" in told
    assert told.count("default") == 6
