"""Serving beside transformers, PEFT, CTranslate2 and llama.cpp: one batch, an adapter for each.

  python -m extras.peers --folder out/peers --prepare          makes and converts the weights
  python -m extras.peers --folder out/peers --json out/peers.json

Needs what this project does not, in an environment of its own:
  pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2 -r requirements.txt
  pip install ctranslate2==4.8.5 xllamacpp==2026.10.11549 gguf==0.19.0      (may be missing)

Random weights in the shape of tiny_starcoder_py, and as many random adapters on c_attn as requests,
written once as PEFT's folders; every engine opens these. All requests are decoded greedily. Before
anything is timed the tokens of every row are compared with transformers' and PEFT's in float32. A
float32 row that has others is left out and named, unless it leaves them at a near-tie (NEAR_TIE),
which is named too. Then the rows are timed in turns, --repeats times.

PEFT mixes LoRAs in a batch by adapter_names. It ignores them for HiRA, the form in which it opens a
FLoRA, so its tokens for FLoRA come from one adapter after another, and are not timed. llama.cpp has
a server that takes a list of LoRAs with each request; it batches requests whose lists are equal.
By default it keeps keys and values in float16; its rows say where it does.
"""
import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm

import flora
from bench import install
from extras import llama_cpp
from extras.int8 import quantize_int8
from extras.peft import save_peft
from extras.results import peers as table_of
from generate import Engine
from model import GPT, model_from_config, preset, read_config
from plumbing.files import BadInput
from plumbing.flags import Help, check_numbers, run_main
from plumbing.outputs import JSON, check_writable, write_json
from plumbing.provenance import provenance

KINDS = ("flora", "lora")
NAMES = {"flora": "FLoRA", "lora": "LoRA"}
NEAR_TIE = 1e-3   # nats by which transformers prefers its token to another engine's, at most
PAUSE = 0.5   # seconds before a run, in which the threads of the engine before it go to sleep

# ---------------------------------------------------------- the weights, as every engine has them


def prepare(args):
    """Make what is not in --folder yet: model/ and adapters/KIND-rRANK/I/, PEFT's folders."""
    folder, config = Path(args.folder), preset(args.model)
    if not (folder / "model" / "tokenizer.json").exists():
        random_model(config, args.seed).save_pretrained(folder / "model")
        write_tokenizer(config.vocab_size, folder / "model" / "tokenizer.json")
    if read_config(folder / "model") != config:
        raise BadInput(f"{folder}: holds another model than {args.model}; use another --folder")
    model = GPT.from_pretrained(folder / "model")
    for kind, rank in kinds_and_ranks(args):
        for i, place in enumerate(places(args, kind, rank)):
            if not (place / "adapter_config.json").exists():
                torch.manual_seed(args.seed + 1000 * rank + i)
                adapter_id = flora.add_adapter(model, kind, rank, ["c_attn"])
                for p in flora.adapter_parameters(model, adapter_id).values():
                    p.data += 0.1 * torch.randn_like(p)
                save_peft(model, adapter_id, place, str(folder / "model"))
                flora.remove_adapter(model, adapter_id)


def random_model(config, seed):
    """Larger matrices in the blocks than at the start of a training: as initialised, the tied
    embedding makes the model repeat its last token, whatever the blocks compute."""
    torch.manual_seed(seed)
    model = model_from_config(config).requires_grad_(False)
    for name, p in model.blocks.named_parameters():
        if p.dim() == 2:
            p.mul_(4)
    return model


def write_tokenizer(size, file):
    """A word for each token, "t5" for 5, which the engines want to see but do not use."""
    words = {"<|endoftext|>": 0} | {f"t{i}": i for i in range(1, size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(file))
    write_json(file.with_name("tokenizer_config.json"), dict(
        tokenizer_class="PreTrainedTokenizerFast", unk_token="<|endoftext|>",
        bos_token="<|endoftext|>", eos_token="<|endoftext|>"))


def kinds_and_ranks(args):
    return [(kind, rank) for kind in KINDS for rank in args.ranks]


def places(args, kind, rank):
    """The folders of the adapters of a kind and rank, one for each request."""
    return [Path(args.folder, "adapters", f"{kind}-r{rank}", str(i))
            for i in range(args.requests)]


# ------------- the rows: {(engine, what, dtype): run}, with run() -> the new tokens of each request


def our_rows(args, prompts):
    weights, rows = Path(args.folder, "model"), {}
    for dtype in ("float32", "bfloat16"):
        model = GPT.from_pretrained(weights, "cpu", getattr(torch, dtype)).requires_grad_(False)
        rows["this", "base", dtype] = partial(our_run, args, model, None, prompts)
        for kind, rank in kinds_and_ranks(args):
            adapters = load_set(model, places(args, kind, rank))
            rows["this", f"{NAMES[kind]} r{rank}", dtype] = partial(
                our_run, args, model, adapters, prompts)
    for dtype in ("int8", "int8-dynamic"):
        model = GPT.from_pretrained(weights).requires_grad_(False)
        quantize_int8(model, dynamic=dtype == "int8-dynamic")
        rows["this", "base", dtype] = partial(our_run, args, model, None, prompts)
    return rows


def load_set(model, folders):
    """Adapters 1, 2, ... of PEFT's folders, as bench.install takes them."""
    install(model)
    for folder in folders:
        flora.load_adapter(model, str(folder))
    flora.freeze_bank(model)
    return {name: (type(layer), layer.adapters, layer.frozen_bank)
            for name, layer in flora.adapter_layers(model)}


def our_run(args, model, adapters, prompts):
    install(model, adapters)
    engine = Engine(model, slots=len(prompts), length=args.prompt + args.new)
    requests = [engine.submit(prompt, adapter_id=i if adapters else 0, max_new_tokens=args.new)
                for i, prompt in enumerate(prompts, 1)]
    engine.run()
    return [request.ids for request in requests]


def transformers_rows(args, prompts):
    rows = {}
    for dtype in ("float32", "bfloat16"):
        rows["transformers", "base", dtype] = partial(
            transformers_run, args, open_base(args, dtype), prompts)
        mixed = open_peft(args, dtype, "lora", args.ranks)
        for rank in args.ranks:
            names = [f"r{rank}-{i}" for i in range(len(prompts))]
            rows["transformers + PEFT", f"LoRA r{rank}", dtype] = partial(
                transformers_run, args, mixed, prompts, adapter_names=names)
    return rows


def open_base(args, dtype):
    from transformers import AutoModelForCausalLM
    dtype = getattr(torch, dtype)
    return AutoModelForCausalLM.from_pretrained(f"{args.folder}/model", dtype=dtype).eval()


def open_peft(args, dtype, kind, ranks):
    """A PeftModel that has the adapters rRANK-I of one kind, in dtype too."""
    from peft import PeftModel
    folders = {f"r{rank}-{i}": str(place) for rank in ranks
               for i, place in enumerate(places(args, kind, rank))}
    first, *others = folders
    model = PeftModel.from_pretrained(open_base(args, dtype), folders[first], adapter_name=first)
    for name in others:
        model.load_adapter(folders[name], adapter_name=name)
    return model.to(getattr(torch, dtype)).eval()


def transformers_run(args, model, prompts, **settings):
    model.generation_config.eos_token_id = None   # every request to its last token
    ids = torch.tensor(prompts)
    rows = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                          max_new_tokens=args.new, pad_token_id=0, **settings)
    return rows[:, args.prompt:].tolist()


class Reference:
    """transformers in float32: the base, or with PEFT's adapters of a kind and rank, "FLoRA r1"."""

    def __init__(self, args, what):
        self.args, self.what = args, what
        if what == "base":
            self.model = open_base(args, "float32")
        else:
            kind, rank = what.lower().split(" r")
            self.model = open_peft(args, "float32", kind, [int(rank)])

    def use(self, i):
        """The adapter of request i."""
        if self.what != "base":
            self.model.set_adapter(f"{self.what.split()[1]}-{i}")

    def tokens(self, prompts):
        """Of one request after another, as PEFT must for FLoRAs, which are HiRAs there."""
        rows = []
        for i, prompt in enumerate(prompts):
            self.use(i)
            rows += transformers_run(self.args, self.model, [prompt])
        return rows

    @torch.no_grad()
    def preference(self, i, ids, token, other):
        """Nats by which `token` is likelier than the other after the ids, with adapter i."""
        self.use(i)
        logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
        return (logits[token] - logits[other]).item()


def ctranslate2_rows(args, prompts):
    import ctranslate2
    from ctranslate2.converters import TransformersConverter
    folder = Path(args.folder, "ctranslate2")
    if not (folder / "vocabulary.json").exists():
        TransformersConverter(f"{args.folder}/model").convert(str(folder), force=True)
    words, rows = [[f"t{i}" for i in prompt] for prompt in prompts], {}
    for dtype in ("float32", "int8"):
        generator = ctranslate2.Generator(str(folder), device="cpu", compute_type=dtype,
                                          intra_threads=torch.get_num_threads())
        rows["CTranslate2", "base", dtype] = partial(ctranslate2_run, args, generator, words)
    return rows


def ctranslate2_run(args, generator, words):
    results = generator.generate_batch(
        words, max_length=args.new, min_length=args.new, beam_size=1, sampling_topk=1,
        include_prompt_in_result=False, end_token=[])
    return [result.sequences_ids[0] for result in results]


def llama_cpp_rows(args, prompts):
    import gguf  # noqa: F401
    import xllamacpp  # noqa: F401
    rows, length, model = {}, args.prompt + args.new, GPT.from_pretrained(f"{args.folder}/model")
    for weights, cache in [("float32", "float32"), ("float32", "float16"), ("int8", "float16")]:
        file = Path(args.folder, f"{weights}.gguf")
        if not file.exists():
            llama_cpp.write_gguf(model, weights, file)
        server = llama_cpp.start_server(file, args.requests, length, cache=cache)
        dtype = weights if cache == weights else f"{weights}, {cache} cache"
        rows["llama.cpp", "base", dtype] = partial(
            llama_cpp_run, args, server, prompts, [None] * args.requests)
    loras = [place / "lora.gguf" for rank in args.ranks for place in places(args, "lora", rank)]
    for lora in loras:
        if not lora.exists():
            llama_cpp.write_lora(lora.parent, lora)
    server = llama_cpp.start_server(file.with_name("float32.gguf"), args.requests, length, loras)
    for i, rank in enumerate(args.ranks):
        numbers = range(i * args.requests, (i + 1) * args.requests)
        rows["llama.cpp", f"LoRA r{rank}", "float32"] = partial(
            llama_cpp_run, args, server, prompts, numbers)
    return rows


def llama_cpp_run(args, server, prompts, loras):
    """All requests at once, as so many clients."""
    with ThreadPoolExecutor(len(prompts)) as clients:
        return list(clients.map(lambda *asked: llama_cpp.complete(server, args.new, *asked),
                                prompts, loras))


# --------------------------------------------------------------------------------- the comparison

MAY_BE_MISSING = {"CTranslate2": (ctranslate2_rows, ["ctranslate2"]),
                  "llama.cpp": (llama_cpp_rows, ["xllamacpp", "gguf"])}


def all_rows(args, prompts):
    """-> (the rows of the engines that are installed, the versions of their packages)."""
    try:
        rows = our_rows(args, prompts) | transformers_rows(args, prompts)
    except ModuleNotFoundError as e:
        raise BadInput(f"{e.name} is not installed, and nothing is timed before its tokens are "
                       "compared; the top of extras/peers.py says what to install") from e
    packages = ["transformers", "peft"]
    for name, (make, needed) in MAY_BE_MISSING.items():
        try:
            rows |= make(args, prompts)
            packages += needed
        except ModuleNotFoundError as e:
            if e.name not in needed:
                raise
            print(f"{name}: skipped, as {e.name} is not installed")
    return rows, {package: version(package) for package in packages}


def tokens_of(args, prompts, rows):
    """Run each row once -> ({row: its tokens}, {what: transformers' and PEFT's in float32})."""
    tokens = {row: run() for row, run in tqdm(rows.items(), desc="compare", unit="row")}
    expected = {what: found for (engine, what, dtype), found in tokens.items()
                if engine.startswith("transformers") and dtype == "float32"}
    return tokens, expected | {f"FLoRA r{rank}": Reference(args, f"FLoRA r{rank}").tokens(prompts)
                               for rank in args.ranks}


def partings(args, prompts, tokens, expected):
    """{row in float32: [(request, token, nats)]}: where requests first have another token than the
    expected one, and by how much transformers prefers that."""
    found = {}
    for row in [row for row in tokens if row[2] == "float32" and tokens[row] != expected[row[1]]]:
        reference, found[row] = Reference(args, row[1]), []
        for i, (mine, theirs) in enumerate(zip(tokens[row], expected[row[1]])):
            n = agreement(mine, theirs)
            if n < len(theirs):
                nats = reference.preference(i, prompts[i] + theirs[:n], theirs[n], mine[n])
                found[row].append((i, n, nats))
    return found


def verdict(row, places):
    """-> (whether a row with these partings is timed, a sentence). BadInput for one of ours."""
    timed = all(nats < NEAR_TIE for _, _, nats in places)
    where = "; ".join(f"request {i} at its token {n}, which transformers prefers by {nats:.1g} nats"
                      for i, n, nats in places)
    sentence = f"{', '.join(row)}, {'timed' if timed else 'left out'}: other tokens in {where}."
    if row[0] == "this" and not timed:
        raise BadInput(f"{sentence} That is a fault here, so nothing is timed")
    return timed, sentence


def agreements(tokens, expected):
    """{row: for each request, how many of its first tokens are the expected ones}"""
    return {row: [agreement(*pair) for pair in zip(found, expected[row[1]], strict=True)]
            for row, found in tokens.items()}


def agreement(found, expected):
    """How many of the first tokens of two lists are equal."""
    unlike = [a != b for a, b in zip(found, expected, strict=True)]
    return unlike.index(True) if True in unlike else len(unlike)


def measure(args, rows):
    """{row: seconds of its run in each round}"""
    seconds = {row: [] for row in rows}
    for row in tqdm([*rows] * args.repeats, desc="time", unit="run"):
        time.sleep(PAUSE)
        begin = time.perf_counter()
        rows[row]()
        seconds[row].append(time.perf_counter() - begin)
    return seconds


def summary(args, seconds, same):
    """Rows of the table. Ratios are medians of those of each round: to our base in float32, and to
    transformers (with PEFT's LoRA of the same rank, mixed) in the same dtype, where it has it."""
    work, base, rows = args.requests * args.new, seconds["this", "base", "float32"], []
    for row, times in seconds.items():
        rows.append(dict(
            engine=row[0], what=row[1], dtype=row[2], same_tokens=statistics.mean(same[row]),
            tokens_per_second=work / statistics.median(times),
            tokens_per_second_min=work / max(times), tokens_per_second_max=work / min(times),
            ratio_to_base=ratio(base, times), ratio_to_peft=ratio(seconds.get(rival(row)), times)))
    return rows


def rival(row):
    """transformers' row in the same dtype, with as many LoRAs of the same rank."""
    _, what, dtype = row
    if what == "base":
        return "transformers", "base", dtype
    return "transformers + PEFT", f"LoRA {what.split()[1]}", dtype


def ratio(others, times):
    return others and statistics.median(b / t for b, t in zip(others, times))


def compare(args):
    check_writable(args.json, "--json", JSON)
    prepare(args)
    torch.manual_seed(args.seed)
    prompts = torch.randint(1, preset(args.model).vocab_size, (args.requests, args.prompt)).tolist()
    rows, versions = all_rows(args, prompts)
    if args.prepare:
        return
    tokens, expected = tokens_of(args, prompts, rows)
    same = agreements(tokens, expected)
    verdicts = {row: verdict(row, places)
                for row, places in partings(args, prompts, tokens, expected).items()}
    rows = {row: run for row, run in rows.items() if verdicts.get(row, (True, ""))[0]}
    data = provenance() | dict(
        versions=versions, model=args.model, requests=args.requests, prompt=args.prompt,
        new=args.new, repeats=args.repeats, notes=[said for _, said in verdicts.values()],
        rows=summary(args, measure(args, rows), same))
    print(table_of(data))
    if args.json:
        write_json(args.json, data)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=Help)
    add = parser.add_argument
    add("--folder", default="out/peers", help="of the weights, made there once and used again")
    add("--prepare", action="store_true", help="make and convert the weights, time nothing")
    add("--model", default="tiny_starcoder_py", help="a published StarCoder's shape")
    add("--ranks", nargs="+", type=int, default=[1, 8], help="of the adapters")
    add("--requests", type=int, default=8, help="in the batch, each with an adapter")
    add("--prompt", type=int, default=64, help="tokens")
    add("--new", type=int, default=64, help="tokens")
    add("--repeats", type=int, default=3, help="rounds, each engine once in each")
    add("--seed", type=int, default=0, help="of all that is drawn at random")
    add("--json", metavar="FILE", help="write the results there as JSON")
    args = parser.parse_args(argv)
    check_numbers(args, ["ranks", "requests", "prompt", "new", "repeats"], at_least_0=["seed"])
    context = preset(args.model).n_positions
    if args.prompt + args.new > context:
        raise BadInput(f"--prompt {args.prompt} and --new {args.new} are more tokens than the context "
                       f"of {args.model} ({context})")
    return args


if __name__ == "__main__":
    run_main(lambda: compare(parse_args()))
