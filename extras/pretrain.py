"""Train a base model itself: from scratch, with a tokenizer of its own, or (--weights) further.

  python train.py --adapter none --steps 4000 --n-layer 6 --n-embd 256 --vocab-size 4096
  python train.py --adapter none --weights base --data src/ --ext .lua

OUT becomes a Hugging Face folder, for --weights of every script. The embedded base (base/) was made
by this, on Python's standard library.
"""
import os
import shlex
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist

import train
from model import GPT, GPTConfig, Tokenizer

LEARNING_RATE = 2e-3   # train.py's default --lr


def default_files():
    """Python's standard library without its tests: code that is on the machine already."""
    stdlib = sysconfig.get_paths()["stdlib"]
    skipped = {"test", "tests", "idle_test", "site-packages"}
    return [file for file in train.find_files([stdlib], [".py"])
            if not skipped & set(file.relative_to(stdlib).parts)]


def train_tokenizer(texts, file, vocab_size):
    """Write a sentencepiece BPE model that keeps whitespace exactly and falls back to bytes."""
    import sentencepiece
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    indents = ["\n" + " " * n for n in (2, 4, 6, 8, 12, 16, 20)]
    with open(f"{file}.tmp", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=f, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True,
            user_defined_symbols=["\n", "\n\n", "\t", *indents], max_sentence_length=1 << 20,
            eos_id=0, eos_piece="<|endoftext|>", unk_id=1, bos_id=-1, pad_id=-1, minloglevel=2)
    os.replace(f"{file}.tmp", file)


def new_base(args, device, texts, checkpoint):
    """A StarCoder of random weights, of the sizes in args, and a tokenizer of the training texts,
    which stays in OUT for the run that resumes this one."""
    if train.RANK == 0 and not checkpoint:
        train_tokenizer(texts, Path(args.out, "tokenizer.model"), args.vocab_size)
    if train.WORLD > 1:
        dist.barrier()
    config = GPTConfig(vocab_size=args.vocab_size, n_positions=args.block_size, n_embd=args.n_embd,
                       n_layer=args.n_layer, n_head=args.n_head, n_inner=4 * args.n_embd)
    model = GPT(config).to(device)
    model.gradient_checkpointing = args.gradient_checkpointing
    return model, Tokenizer(args.out)


def decay_groups(parameters):
    """AdamW's groups: weight decay for the matrices, none for biases and norms."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    return [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]


def pretrain(args, device, texts, checkpoint):
    """train.py's run for --adapter none: all parameters of the base train, in float32."""
    if args.weights:
        model, tokenizer = train.load_base(args, device, torch.float32)
    else:
        model, tokenizer = new_base(args, device, texts[0], checkpoint)
    parameters = model.base_parameters()
    train.say_sizes(args, model, parameters)
    data = train.encode_data(args, texts, tokenizer)
    report = train.fit_text(args, model, parameters, data, None, checkpoint,
                            groups=decay_groups(parameters))
    if train.RANK > 0:
        return report
    model.save_pretrained(args.out, torch.float16)
    tokenizer.save(args.out)
    hint = f"--weights {shlex.quote(args.out)}"
    return train.finish(args, report | dict(adapter_file=None), hint)
