"""What extras/peers.py compares: weights that every engine opens, and a row for each engine's run.

A row is (engine, what, dtype), "what" being "base" or adapters, "LoRA r1"; its run() decodes all
requests greedily, each with its own adapter, -> the new tokens of each. An engine that may be
missing has a function that gives its rows and the versions of its packages (OTHERS).
"""
import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import flora
from bench import install
from extras import llama_cpp
from extras.int8 import quantize_int8
from extras.peft import save_peft
from generate import Engine
from model import GPT, model_from_config, preset, read_config
from plumbing.files import BadInput
from plumbing.outputs import write_json

KINDS = ("flora", "lora")
NAMES = {"flora": "FLoRA", "lora": "LoRA"}
TARGETS = {"gpt_bigcode": ["c_attn"], "llama": ["q_proj", "v_proj"]}   # of the adapters, by family
WORKER = str(Path(__file__).with_name("peers_vllm.py"))

# ---------------------------------------------------------- the weights, as every engine has them


def prepare(args):
    """Make what is not in --folder yet: model/ and adapters/KIND-rRANK/I/, PEFT's folders."""
    folder, config = Path(args.folder), preset(args.model)
    targets = TARGETS[config.model_type]
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
                adapter_id = flora.add_adapter(model, kind, rank, targets)
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


# -------------- engines that may be missing -> (rows, versions); Unable and why, where they cannot


class Unable(Exception):
    """Why an engine has no rows here."""


def versions(*packages):
    return {package: version(package) for package in packages}


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
    return rows, versions("ctranslate2")


def ctranslate2_run(args, generator, words):
    results = generator.generate_batch(
        words, max_length=args.new, min_length=args.new, beam_size=1, sampling_topk=1,
        include_prompt_in_result=False, end_token=[])
    return [result.sequences_ids[0] for result in results]


def llama_cpp_rows(args, prompts):
    rows = {}
    for weights, cache in [("float32", "float32"), ("float32", "float16"), ("int8", "float16")]:
        server = llama_cpp.start_server(gguf_file(args, weights), args.requests,
                                        args.prompt + args.new, cache=cache)
        dtype = weights if cache == weights else f"{weights}, {cache} cache"
        rows["llama.cpp", "base", dtype] = partial(
            llama_cpp_run, args, server, prompts, [None] * args.requests)
    return rows, versions("xllamacpp", "gguf")


def gguf_file(args, weights):
    """The base as llama.cpp opens it, made where it is not there yet."""
    import gguf  # noqa: F401
    import xllamacpp  # noqa: F401
    if preset(args.model).model_type != "gpt_bigcode":
        raise Unable("extras/llama_cpp.py writes StarCoders alone")
    file = Path(args.folder, f"{weights}.gguf")
    if not file.exists():
        llama_cpp.write_gguf(GPT.from_pretrained(f"{args.folder}/model"), weights, file)
    return file


def llama_cpp_lora_rows(args, prompts):
    rows, file = {}, gguf_file(args, "float32")
    loras = [place / "lora.gguf" for rank in args.ranks for place in places(args, "lora", rank)]
    for lora in loras:
        if not lora.exists():
            llama_cpp.write_lora(lora.parent, lora)
    server = llama_cpp.start_server(file, args.requests, args.prompt + args.new, loras)
    for i, rank in enumerate(args.ranks):
        numbers = range(i * args.requests, (i + 1) * args.requests)
        rows["llama.cpp", f"LoRA r{rank}", "float32"] = partial(
            llama_cpp_run, args, server, prompts, numbers)
    return rows, versions("xllamacpp", "gguf")


def llama_cpp_run(args, server, prompts, loras):
    """All requests at once, as so many clients."""
    with ThreadPoolExecutor(len(prompts)) as clients:
        return list(clients.map(lambda *asked: llama_cpp.complete(server, args.new, *asked),
                                prompts, loras))


def vllm_rows(args, prompts):
    """Its base and, on a Llama, its LoRAs: on StarCoder's c_attn vLLM 0.32 drops them unsaid."""
    if not Path(args.vllm_python).exists():
        raise Unable(f"there is no {args.vllm_python}")
    rows, ranks = {}, args.ranks if preset(args.model).model_type == "llama" else []
    for dtype in ("float32", "bfloat16"):
        for rank in [None, *ranks]:
            worker = Worker(args, dtype, rank)
            what = f"LoRA r{rank}" if rank else "base"
            rows["vLLM", what, dtype] = partial(worker.run, prompts, args.new)
    return rows, dict(vllm=worker.version)


class Worker:
    """extras/peers_vllm.py, in vLLM's environment: the base, or it with the LoRAs of a rank.
    Between its runs it is stopped: thirteen threads of gloo wake up all the time."""

    def __init__(self, args, dtype, rank=None):
        loras = places(args, "lora", rank) if rank else []
        settings = dict(model=f"{args.folder}/model", dtype=dtype, loras=[*map(str, loras)],
                        rank=rank, requests=args.requests, length=args.prompt + args.new,
                        threads=torch.get_num_threads())
        self.log = Path(args.folder, f"vllm-{dtype}-{rank or 'base'}.log")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [args.vllm_python, WORKER, json.dumps(settings)], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env=os.environ | surroundings(args.vllm_python))
        self.version = self.answer()["ready"]

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text().strip().splitlines() or ["nothing"]
            raise BadInput(f"vLLM ended, and its last line was: {said[-1]} ({self.log})")
        return json.loads(line)

    def run(self, prompts, new):
        self.process.send_signal(signal.SIGCONT)
        with suppress(BrokenPipeError):   # it has ended, which answer() tells
            print(json.dumps(dict(prompts=prompts, new=new)), file=self.process.stdin, flush=True)
        tokens = self.answer()
        self.process.send_signal(signal.SIGSTOP)
        return tokens


def surroundings(python):
    """Variables for a worker: extras/ is no place to look for a package, since it has a requests.py;
    and the OpenMP that vLLM is installed with comes first, as its manual wants for speed."""
    library = Path(python).absolute().parents[1] / "lib" / "libiomp5.so"
    variables = dict(PYTHONSAFEPATH="1")
    if library.exists():
        variables["LD_PRELOAD"] = str(library)
    return variables


OTHERS = {"CTranslate2": ctranslate2_rows, "llama.cpp": llama_cpp_rows,
          "llama.cpp-LoRA": llama_cpp_lora_rows, "vLLM": vllm_rows}   # by the names of --engines
