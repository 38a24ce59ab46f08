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


def load_texts(args):
    """--data, read and deduplicated -> (training texts, held-out texts)."""
    files = find_files(args.data, args.ext) if args.data else default_files(args.adapter)
    texts, skipped = read_texts(files)
    distinct = texts if args.keep_duplicates else drop_near_duplicates(texts)
    training, heldout = split(distinct)
    say(f"data: {len(files):,} files, {skipped:,} skipped (empty, binary or not UTF-8), "
        f"{len(texts) - len(distinct):,} near-duplicates dropped; "
        f"{len(training):,} to train on, {len(heldout):,} held out")
    return training, heldout


def find_files(data, extensions=()):
    """Folders (searched through, hidden parts skipped), globs and files -> sorted list of Paths."""
    found = set()
    for pattern in data:
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not matches:
            raise BadInput(f"--data {pattern}: no such file, folder or glob match")
        for match in map(Path, matches):
            inside = [match] if match.is_file() else match.rglob("*")
            found.update(p for p in inside if p.is_file() and not hidden(p.relative_to(match)))
    return sorted(p for p in found if not extensions or p.suffix in extensions)


def hidden(path):
    return any(part.startswith(".") for part in path.parts)


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


def split(texts, share=0.05):
    """-> (training texts, held-out texts), entire files. The order and the split follow from the
    texts' SHA-1 alone, so they are the same on every machine and for every seed."""
    if len(texts) < 2:
        raise BadInput(f"--data holds {len(texts)} distinct readable text files after "
                       "deduplication; at least 2 are needed, one of them held out "
                       "(check the path and --ext)")
    texts = sorted(texts, key=lambda text: hashlib.sha1(text.encode()).digest())
    n = max(1, min(4, len(texts) // 5), round(share * len(texts)))   # of a few files, several
    return texts[n:], texts[:n]
