"""Half a minute: the embedded model, which knows Python, learns a language so well that programs pass.

  python -m extras.teach --i-trust-the-code                              Perl
  python -m extras.teach javascript --adapter lora --i-trust-the-code

Makes solved toy problems of the language (extras/toy_problems.py), trains one adapter on them by
train.py with FLAGS, and runs what the base and the adapter write for the 48 held-out problems, one
program each, sampled at temperature 0.1. pass@1 is the share of programs that pass their tests.

Generated programs are untrusted: read the top of extras/sandbox.py.
"""
import argparse
import tempfile

import flora
import train
from extras import toy_problems
from extras.demo import problem_of
from extras.passk import add_consent_flag, check_languages, require_consent, summary
from extras.toys import run_adapter
from model import GPT
from plumbing.flags import EMBEDDED, Help, run_main
from plumbing.tokenizer import Tokenizer

LANGUAGES = {"perl": "pl", "javascript": "js", "bash": "sh"}
TEXTS = 4000   # solved problems
FLAGS = ("--rank 8 --steps 300 --batch-size 2 --block-size 128 --eval-every 300 "
         "--eval-tokens 2000 --keep-duplicates --fast")


def write_texts(folder, language):
    texts = [toy_problems.solved(language, *task) for task in toy_problems.more_tasks(TEXTS)]
    files = range(0, TEXTS, toy_problems.PER_FILE)
    toy_problems.write_texts(folder, ["\n".join(texts[i:i + toy_problems.PER_FILE]) for i in files])


def teach(args):
    """Train, and print pass@1 before and after."""
    require_consent(args)
    language = LANGUAGES[args.language]
    problems = [problem_of(language, *task)._replace(name=str(i))
                for i, task in enumerate(toy_problems.make_tasks()[0])]
    check_languages(problems)
    with tempfile.TemporaryDirectory() as folder:
        write_texts(folder, language)
        out = args.out or f"out/{args.language}"
        report = train.train(train.parse_args([
            *FLAGS.split(), "--adapter", args.adapter, "--data", folder, "--out", out,
            "--seed", str(args.seed)]))
    model, tokenizer = GPT.from_pretrained(EMBEDDED).requires_grad_(False), Tokenizer(EMBEDDED)
    passed = {}
    for who, file in [("base", "none"), ("adapter", report["adapter_file"])]:
        counts = run_adapter(model, tokenizer, file, problems, 1)
        passed[who] = summary(problems, counts, [1])[0]["pass@1"]
    print(f"\n{args.language}, {len(problems)} held-out problems: pass@1 {passed['base']:.3f} by the "
          f"base model, {passed['adapter']:.3f} with the adapter")
    return passed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("language", nargs="?", choices=list(LANGUAGES), default="perl", help="default: perl")
    add("--adapter", choices=list(flora.KINDS), default="flora", help="its kind")
    add("--seed", type=int, default=0, help="of the training")
    add("--out", metavar="FOLDER", help="of the training (default: out/LANGUAGE)")
    add_consent_flag(parser)
    teach(parser.parse_args())


if __name__ == "__main__":
    run_main(main)
