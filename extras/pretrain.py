"""Train a base model itself: from scratch, with a tokenizer of its own, or (--weights) further.

  python train.py --adapter none --steps 4000 --n-layer 6 --n-embd 256 --vocab-size 4096
  python train.py --adapter none --weights base --data src/ --ext .lua
  python -m extras.pretrain FILE       what it reads without --data, as a list for --data @FILE

OUT becomes a Hugging Face folder, for --weights of every script: the new model is put together in
OUT/unfinished, and takes the place of what OUT holds when it is complete. The embedded base (base/)
was made by this, on the Python that a fresh environment has; the list serves to mix it with more.
"""
import argparse
import itertools
import os
import sysconfig
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import train
from model import GPT, GPTConfig
from plumbing.files import BadInput
from plumbing.flags import Help, run_main
from plumbing.outputs import open_output, write_json
from plumbing.processes import RANK, WORLD, interrupts
from plumbing.report import finish, make_report, say_sizes
from plumbing.runs import begin
from plumbing.texts import drop_near_duplicates, find_files, read_texts
from plumbing.tokenizer import TOKENIZER_FILES, Tokenizer

LEARNING_RATE = 2e-3   # train.py's default --lr
TOKENIZER_CHARACTERS = 20_000_000   # more text makes no better tokens, and takes gigabytes

# Of the packages that the requirements install, those with Python in quantity
PACKAGES = ["torch", "numpy", "sympy", "mpmath", "networkx", "jinja2", "fsspec", "matplotlib",
            "mpl_toolkits", "PIL", "fontTools", "dateutil", "pyparsing", "packaging", "pluggy",
            "_pytest", "setuptools", "tqdm"]
# Tests, copies of other packages, tables of measurements, and Python that writes C++ or CUDA
SKIPPED = {"test", "tests", "testing", "idle_test", "site-packages", "_vendor", "benchmarks",
           "codegen", "_inductor", "hipify"}


def default_files():
    """Python that is on the machine already: the standard library and PACKAGES, without tests."""
    stdlib, site = Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parents[1]
    places = {stdlib: stdlib}
    places |= {site / name: site for name in PACKAGES if (site / name).is_dir()}
    return [file for place, root in places.items() for file in find_files([place], [".py"])
            if not SKIPPED & set(file.relative_to(root).parts)]


def distinct_files():
    """default_files() without near-duplicates, as train.py drops them."""
    file_of = {}
    for file in default_files():
        for text in read_texts([file])[0]:
            file_of.setdefault(text, file)
    return [file_of[text] for text in drop_near_duplicates(file_of)]


def train_tokenizer(texts, file, vocab_size):
    """Write a sentencepiece BPE model that keeps whitespace exactly and falls back to bytes, and
    beside it the names of its special tokens, for transformers and CTranslate2.

    It learns from as many entire texts, in their order, as make TOKENIZER_CHARACTERS."""
    import sentencepiece
    sizes = itertools.accumulate(map(len, texts), initial=0)
    texts = [text for text, before in zip(texts, sizes) if before < TOKENIZER_CHARACTERS]
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    indents = ["\n" + " " * n for n in (2, 4, 6, 8, 12, 16, 20)]
    with open_output(file) as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=f, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True,
            user_defined_symbols=["\n", "\n\n", "\t", *indents], max_sentence_length=1 << 20,
            eos_id=0, eos_piece="<|endoftext|>", unk_id=1, bos_id=-1, pad_id=-1, minloglevel=2)
    write_json(file.with_name("tokenizer_config.json"), dict(
        bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<unk>"))


def new_base(args, device, texts, checkpoint):
    """A StarCoder of random weights, of the sizes in args, and a tokenizer of the training texts,
    which waits in OUT for the end, or for the run that resumes this one."""
    folder = unfinished(args)
    if RANK == 0 and not checkpoint:
        train_tokenizer(texts, folder / "tokenizer.model", args.vocab_size)
    if WORLD > 1:
        dist.barrier()
    config = GPTConfig(vocab_size=args.vocab_size, n_positions=args.block_size, n_embd=args.n_embd,
                       n_layer=args.n_layer, n_head=args.n_head, n_inner=4 * args.n_embd)
    model = GPT(config).to(device)
    model.gradient_checkpointing = args.gradient_checkpointing
    moved = not (folder / "tokenizer.model").exists()   # by a run that was killed at its very end
    return model, Tokenizer(args.out if moved else folder)


def unfinished(args):
    """The folder in OUT where the new model is put together."""
    folder = Path(args.out, "unfinished")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as e:
        raise BadInput(f"--out {args.out}: cannot be written ({e.strerror})") from None
    return folder


def decay_groups(parameters):
    """AdamW's groups: weight decay for the matrices, none for biases and norms."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    return [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]


def pretrain(args):
    """train.py's run for --adapter none: all parameters of the base train, in float32."""
    with begin(args) as run:
        if args.weights:
            model, tokenizer = train.load_base(args, run.device, torch.float32)
        else:
            model, tokenizer = new_base(args, run.device, run.texts[0], run.checkpoint)
        parameters = model.base_parameters()
        say_sizes(args, model, parameters)
        data = train.encode_data(args, run.texts, tokenizer)
        task = train.text_task(args, model, data, None)
        optimizer = train.adamw(decay_groups(parameters))
        with interrupts() as stop:
            log, rate = train.fit(model, parameters, *task, train.loop_of(args), stop, run.checkpoint, optimizer)
        report = make_report(args, model, parameters, data, log, rate)
        return finish(args, report | dict(adapter_file=None), partial(save_model, model, tokenizer, args))


def save_model(model, tokenizer, args):
    """Write all files of the model apart, then move them to OUT: the weights are the last, so that
    OUT is never taken for a model while it holds files of two."""
    folder = unfinished(args)
    model.save_pretrained(folder, torch.float16)
    tokenizer.save(folder)
    try:
        for name in ("model.safetensors", *TOKENIZER_FILES):
            Path(args.out, name).unlink(missing_ok=True)
        for file in sorted(folder.iterdir(), key=lambda file: file.suffix == ".safetensors"):
            os.replace(file, Path(args.out, file.name))
        folder.rmdir()
    except OSError as e:
        raise BadInput(f"--out {args.out}: cannot be written ({e.strerror}); the new model is "
                       f"complete, or its files are in {folder}") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=Help)
    parser.add_argument("list", metavar="FILE", help="where to write the list of the base's files")
    args = parser.parse_args()
    with open_output(args.list) as f:
        f.write("".join(f"{file}\n" for file in distinct_files()).encode())


if __name__ == "__main__":
    run_main(main)
