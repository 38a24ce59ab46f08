"""--help of the extras' scripts: each flag says what it is and what it is when left out."""
import argparse
import importlib
import sys

import pytest

from plumbing.flags import Help

SCRIPTS = ["bench_engine", "demo", "passk", "peers", "peers_engines", "peers_hira", "peers_training", "pretrain",
           "table1", "toy_problems", "toys", "train_many", "whisper", "whisper_data"]


class Parsing(Exception):
    """In the place of parsing."""


def parser_of(script, monkeypatch):
    """The ArgumentParser of extras/SCRIPT.py."""
    module = importlib.import_module(f"extras.{script}")
    found = []

    def stop(parser, *args, **kwargs):
        found.append(parser)
        raise Parsing

    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    with pytest.raises(Parsing):
        (module.parse_args if hasattr(module, "parse_args") else module.main)()
    return found[0]


def every_action(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from every_action(command)
        else:
            yield parser, action


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_text_and_tells_its_default(script, monkeypatch):
    if script == "peers_hira":
        pytest.importorskip("peft")
    for parser, action in every_action(parser_of(script, monkeypatch)):
        where = f"{script} {parser.prog}: {action.option_strings or action.dest}"
        assert action.help and parser.formatter_class is Help, where
        told = parser._get_formatter()._expand_help(action)
        if action.option_strings and not isinstance(action, argparse._HelpAction):
            assert "default" in told or "(required)" in told, f"{where}: {told}"
            assert ("auto" in told) <= ("auto" in (action.choices or [])), f"{where}: {told}"


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
