"""From files to training texts."""
import shlex
from argparse import Namespace

import pytest

import train
from plumbing.files import BadInput
from plumbing.flags import EMBEDDED
from plumbing.texts import (drop_near_duplicates, find_files, line_of, load_texts,
                            read_texts, split, within_budget)
from plumbing.tokenizer import Tokenizer
from test_flora import TINY, tiny_flags


def test_data_is_deduplicated_and_whole_files_are_held_out(tmp_path):
    folder = tmp_path / "code"
    (folder / ".git").mkdir(parents=True)
    body = ("int {0}_add(int a) {{\n  return a + 1;\n}}\n"
            "int {0}_sub(int a) {{\n  return a - 2;\n}}\n")
    for name in ("one", "two", "three"):                        # generated: a name differs
        (folder / f"{name}.h").write_text(body.format(name))
    for i in range(40):
        lines = [f"word{i} " * (1 + (i * j) % 7) + ";\n" for j in range(12)]
        (folder / f"f{i}.h").write_text("".join(lines))
    (folder / "binary.h").write_bytes(b"\x00\x01\xff")
    (folder / "latin1.h").write_bytes("é".encode("latin-1"))
    (folder / "empty.h").write_text("")
    (folder / "notes.txt").write_text("not code")
    (folder / ".git" / "hidden.h").write_text("hidden")
    files = find_files([str(folder)], [".h"])
    assert len(files) == 46 and files == sorted(files)
    assert files == find_files([str(folder / "*.h")])
    texts, skipped = read_texts(files)
    assert (len(texts), skipped) == (43, 3)
    distinct = drop_near_duplicates(texts)
    assert sum("_add" in text for text in distinct) == 1
    training, held = split(distinct)
    assert not set(training) & set(held) and sorted(training + held) == sorted(distinct) and held
    tokenizer = Tokenizer(EMBEDDED)
    x, y, size = train.heldout_blocks(held, tokenizer, 16, 10**9)
    assert size == sum(len(t.encode()) for t in held)
    assert int((y != -100).sum()) == sum(len(tokenizer.encode(t)) for t in held)


def test_linked_folders_are_read_once_and_an_extension_needs_no_dot(tmp_path, capsys):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (folder / "inner").mkdir(parents=True)
    (elsewhere / "deep" / ".hidden").mkdir(parents=True)
    (folder / "a.lua").write_text("a = 1")
    (folder / "inner" / "b.lua").write_text("b")
    (elsewhere / "deep" / "c.lua").write_text("c = 1")
    (elsewhere / "deep" / ".hidden" / "d.lua").write_text("d")
    (elsewhere / "notes.txt").write_text("notes")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder / "inner")       # the same files by another way
    (folder / "inner" / "back").symlink_to(folder)        # a circle
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    (folder / "z.lua").symlink_to(folder / "a.lua")
    for extension in (".lua", "lua", "*.lua"):
        found = find_files([str(folder)], [extension])
        assert [path.name for path in found] == ["a.lua", "b.lua", "c.lua"] == sorted(
            path.name for path in found)
    assert len(find_files([str(folder)])) == 4
    args = Namespace(data=[str(folder)], ext=["lua", ".rkt"], keep_duplicates=True, adapter="flora")
    load_texts(args)
    told = capsys.readouterr().out
    assert "--ext .rkt: no file of --data ends so" in told and "--ext lua" not in told


def test_a_text_that_comes_again_is_never_both_trained_on_and_held_out():
    for copies in (2, 3, 5):
        texts = [f"x = {i}\n" for i in range(20)] * copies + [f"\n x  = {i}" for i in range(20)]
        training, held = split(texts)
        assert held and not {t.strip() for t in training} & {t.strip() for t in held}
        assert not {"".join(t.split()) for t in training} & {"".join(t.split()) for t in held}
        assert len(set(held)) == len(held) and set(training) <= set(texts)
        assert sorted(training) == sorted(
            t for t in texts if "".join(t.split()) not in {"".join(h.split()) for h in held})


def test_the_split_follows_from_the_texts_alone_not_from_their_order():
    texts = [f"x{i} = {i}\n" for i in range(60)]
    training, held = split(texts)
    assert len(held) == 4
    for mixed in (texts[::-1], texts[7:] + texts[:7]):
        assert split(mixed) == (training, held)
    assert {texts.index(text) for text in held} != set(range(4)) != {56, 57, 58, 59}
    more = split(texts + ["x60 = 60\n"])[1]   # one file more moves one file at most
    assert len(set(more) - set(held)) <= 1


@pytest.mark.parametrize("known,kept", [(4, True), (5, True), (6, False), (10, False)])
def test_a_text_is_a_near_duplicate_when_over_half_of_its_windows_are_known(known, kept):
    """Of 10 windows of 5 lines, `known` stand in an earlier text, but for names and numbers."""
    old = ["x" * (1 + i % 3) + " = ," + "+" * i for i in range(14)]
    shared = [line.replace("x", "y7") for line in old[:known + 4]]
    new = shared + ["-" * (1 + i) for i in range(14 - len(shared))]
    first, second = "\n".join(old), "\n".join(new)
    assert drop_near_duplicates([first, second]) == [first] + [second] * kept


def test_a_few_files_are_split_by_position_and_measured_within_the_budget(tmp_path, capsys):
    tokenizer, line = Tokenizer(EMBEDDED), "total = total + values[{}]\n"
    for n in (1, 2, 4):
        texts = ["".join(line.format(1000 * n + i) for i in range(m)) for m in range(400, 400 + n)]
        for i, text in enumerate(texts):
            (tmp_path / f"{n}-{i}.txt").write_text(text)
        args = Namespace(data=[str(tmp_path / f"{n}-*.txt")], ext=[], keep_duplicates=True,
                         adapter="flora")
        training, held = load_texts(args)
        assert "the last 5 % of each is held out" in capsys.readouterr().out
        assert sorted(a + b for a, b in zip(training, held)) == sorted(texts)
        for text in held:
            assert text.startswith("total") and 19 <= text.count("\n") <= 21
        measured = list(within_budget(held, tokenizer, 60))
        assert len(measured) == 1 and 55 <= len(measured[0][1]) <= 61
        assert held[0].startswith(measured[0][0])
        assert measured[0][1] == tokenizer.encode(measured[0][0])
        assert [text for text, _ in within_budget(held, tokenizer, 10**6)] == held
    for text in ("one line, " * 30, "x\n", "ab", "é" * 100):   # without a line to cut after
        (training,), (held,) = split([text])
        assert training + held == text and training and held
        for budget in (1, 2, 5):
            assert list(within_budget([held], tokenizer, budget))[0][0]
    with pytest.raises(BadInput, match="too little text to hold some"):
        split(["x"])


def test_held_out_files_are_entire_while_they_fit_the_budget():
    tokenizer = Tokenizer(EMBEDDED)
    texts = [f"x{i} = {i}\n" * 10 for i in range(5)]
    sizes = [len(tokenizer.encode(text)) + 1 for text in texts]
    assert len(texts) == len(list(within_budget(texts, tokenizer, sum(sizes))))
    assert len(texts) - 1 == len(list(within_budget(texts, tokenizer, sum(sizes) - 1)))
    large = texts[0] * 9   # does not fit, and the ones after it do
    mixed = [texts[0], large, *texts[1:]]
    assert [text for text, _ in within_budget(mixed, tokenizer, sum(sizes))] == texts


def test_the_line_to_try_after_a_training_is_of_its_data(tmp_path, capsys):
    lua = "-- A header\n\nlocal function add(a, b)\n  return a + b\nend\n\n  it's('a')\n"
    assert line_of(lua) == "return a + b" and line_of("one line alone") == "one line alone"
    assert line_of("%%\n" * 9) and len(line_of("x" * 99 + "\n" + "y" * 999)) == 40
    (tmp_path / "a.lua").write_text("  it's(a)\n" * 99)
    args = train.parse_args(tiny_flags(TINY, tmp_path / "out", "--data", tmp_path / "a.lua",
                                       "--steps", 0, "--block-size", 8))
    train.train(args)
    hint = next(line for line in capsys.readouterr().out.splitlines() if "--prompt" in line)
    flags = shlex.split(hint)
    assert flags[flags.index("--prompt") + 1] == "it's(a)" == args.try_prompt


def test_one_text_file_is_enough_for_a_training_and_its_measure_keeps_to_the_budget(tmp_path):
    (tmp_path / "input.txt").write_text("".join(f"line {i} of a long text\n" for i in range(9000)))
    args = train.parse_args(tiny_flags(TINY, tmp_path / "out", "--data", tmp_path / "input.txt",
                                       "--steps", 1, "--block-size", 8, "--eval-tokens", 100))
    report = train.train(args)
    assert 90 <= report["heldout_tokens"] <= 102 and report["heldout_bytes"] < 1000
