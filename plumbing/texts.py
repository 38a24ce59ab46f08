"""From files to training texts: find, read, drop near-duplicates, hold some out."""
import glob
import hashlib
import os
import re
from pathlib import Path

import torch

from plumbing.files import BadInput
from plumbing.processes import say
from plumbing.registry import extra


FEWEST = 5      # files of which entire ones are held out
SHARE = 0.05   # that is held out


def load_texts(args):
    """--data, read and deduplicated -> (training texts, held-out texts)."""
    files = find_files(args.data, args.ext) if args.data else default_files(args.adapter)
    for ext in args.ext if args.data else []:
        if not any(file.name.endswith(dotted(ext)) for file in files):
            say(f"--ext {ext}: no file of --data ends so")
    texts, skipped = read_texts(files)
    distinct = texts if args.keep_duplicates else drop_near_duplicates(texts)
    training, heldout = split(distinct)
    say(f"data: {len(files):,} files, {skipped:,} skipped (empty, binary or not UTF-8), "
        f"{len(texts) - len(distinct):,} near-duplicates dropped; "
        f"{len(training):,} to train on, {len(heldout):,} held out")
    if too_few(distinct):
        say(f"data: fewer than {FEWEST} files are too few to hold entire ones out, so the last "
            f"{100 * SHARE:.0f} % of each is held out")
    args.try_prompt = line_of(heldout[0])
    return training, heldout


def middle_line(text):
    """A line with a word from the middle of a text, as it stands."""
    lines = f"{text[len(text) // 2:]}\n{text}".splitlines(keepends=True)[1:]
    return next((line for line in lines if re.search(r"\w{2}", line)), text)


def line_of(text):
    """Such a line, to try with what was trained on such."""
    return middle_line(text).strip()[:40]


def find_files(data, extensions=()):
    """Folders (searched through, hidden parts skipped), globs and files -> sorted list of Paths, of
    links to one file the first. extensions: as .lua; lua and *.lua are understood."""
    found, endings = set(), tuple(map(dotted, extensions))
    for pattern in data:
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not matches:
            raise BadInput(f"--data {pattern}: no such file, folder or glob match")
        for match in map(Path, matches):
            found.update([match] if match.is_file() else files_in(match))
    found = sorted(p for p in found if p.is_file() and p.name.endswith(endings or ""))
    once = {}
    for path in found:
        once.setdefault(os.path.realpath(path), path)
    return list(once.values())


def files_in(folder):
    """Yield what is in a folder, and in the folders in it, linked ones too; hidden parts are
    skipped."""
    seen = set()   # a link may lead back
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if name[0] != ".")
        if real not in seen:
            yield from (Path(place, name) for name in names if name[0] != ".")
        seen.add(real)


def dotted(extension):
    return "." + extension.lstrip("*.")


def default_files(adapter):
    """Real code that is on the machine already: torch's C++ headers, a language that the embedded
    base has not seen; for the base itself, Python's standard library."""
    if adapter == "none":
        return extra("pretrain", "--adapter none").default_files()
    return find_files([os.path.join(os.path.dirname(torch.__file__), "include")], [".h", ".hpp"])


def read_texts(files):
    """-> (texts, number of files skipped because they are empty, binary or not UTF-8)."""
    texts = []
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip() and "\0" not in text:
            texts.append(text)
    return texts, len(files) - len(texts)


def drop_near_duplicates(texts, window=5):
    """Keep a text unless over half of its 5-line windows were in texts kept before it, names and
    numbers aside: generated headers that differ by a name only count as one."""
    seen, kept = set(), []
    for text in texts:
        lines = [re.sub(r"\w+", "a", line).strip() for line in text.splitlines()]
        lines = [line for line in lines if line]
        starts = range(max(1, len(lines) - window + 1))
        windows = {hash(tuple(lines[i:i + window])) for i in starts}
        if 2 * len(windows & seen) <= len(windows):
            kept.append(text)
            seen |= windows
    return kept


def too_few(texts):
    return len(set(texts)) < FEWEST


def split(texts):
    """-> (training texts, held-out texts), entire files. The order and the split follow from the
    texts' SHA-1 alone, so they are the same on every machine and for every seed. A text that comes
    again, but for its white space, is in one of the two alone."""
    if not texts:
        raise BadInput("--data holds 0 distinct readable text files after deduplication; "
                       "at least 1 is needed (check the path and --ext)")
    texts = sorted(texts, key=lambda text: hashlib.sha1(text.encode()).digest())
    distinct = list(dict.fromkeys(texts))
    if too_few(texts):
        return split_each(distinct)
    n = max(1, min(4, len(distinct) // 5), round(SHARE * len(distinct)))   # of a few, several
    heldout = distinct[:n]
    known = {" ".join(text.split()) for text in heldout}
    return [text for text in texts if " ".join(text.split()) not in known], heldout


def split_each(texts):
    """-> (the beginnings of a few texts, their ends): cut after a line where there are several."""
    ends = [position(text) for text in texts]
    training = [text[:end] for text, end in zip(texts, ends) if end]
    heldout = [text[end:] for text, end in zip(texts, ends) if end < len(text)]
    if not training or not heldout:
        raise BadInput("--data holds too little text to hold some of it out; give more")
    return training, heldout


def position(text):
    """Where the held-out end of a text begins."""
    at = max(1, min(len(text) - 1, round((1 - SHARE) * len(text))))
    after_line = text.find("\n", at - 1) + 1
    return after_line if 0 < after_line < len(text) else at


def within_budget(texts, tokenizer, budget):
    """Yield (held-out text, its ids) of about `budget` tokens, the one that begins a text included:
    entire texts, or, where the first is larger, its beginning."""
    left = budget
    for text in texts:
        ids = tokenizer.encode(text)
        if left == budget and len(ids) + 1 > budget:
            begin = tokenizer.decode(ids[:max(1, budget - 1)]).rstrip("\ufffd")
            text = text[:max(1, len(begin))]
            ids = tokenizer.encode(text)
        if left == budget or len(ids) + 1 <= left:
            left -= len(ids) + 1
            yield text, ids
