"""From files to training texts."""
import train
from plumbing.flags import EMBEDDED
from plumbing.texts import drop_near_duplicates, find_files, read_texts, split
from plumbing.tokenizer import Tokenizer


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
