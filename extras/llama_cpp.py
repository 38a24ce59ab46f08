"""A StarCoder and its LoRAs as llama.cpp's files (GGUF), and llama.cpp's server on them.

  write_gguf(model, "float32", "base.gguf");  write_lora("PEFT_FOLDER", "lora.gguf")
  server = start_server("base.gguf", slots=8, length=128, loras=["lora.gguf"])
  complete(server, 64, prompt, lora=0)

Needs the package gguf, the server xllamacpp. Token i is written as the word "ti": the server takes
ids and gives text. To export a model with its tokenizer, use llama.cpp's own converter.
"""
import json
import re
from pathlib import Path

import torch

from plumbing.adapter_files import load_tensors
from plumbing.files import read_json

BLOCK = {   # a block's tensors: our names, llama.cpp's
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
OUTSIDE = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}


def gguf_name(name):
    """transformer.h.0.attn.c_attn.weight -> blk.0.attn_qkv.weight"""
    place, _, end = name.removeprefix("transformer.").rpartition(".")
    if place in OUTSIDE:
        return f"{OUTSIDE[place]}.{end}"
    _, i, place = place.split(".", 2)
    return f"blk.{i}.{BLOCK[place]}.{end}"


def write_gguf(model, dtype, file):
    """A StarCoder in float32, or its matrices in int8: llama.cpp's Q8_0, a scale for 32 weights."""
    import gguf
    c, q8 = model.config, gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(f"{file}.part", "starcoder")
    writer.add_context_length(c.n_positions)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(c.n_inner)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_eps(c.layer_norm_epsilon)
    add_words(writer, c.vocab_size)
    for name, p in model.base_parameters().items():
        values = p.detach().numpy()
        if dtype == "int8" and p.dim() == 2 and "wpe" not in name:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, q8), raw_dtype=q8)
        else:
            writer.add_tensor(gguf_name(name), values)
    write_all(writer, file)


def add_words(writer, size):
    """The vocabulary <|endoftext|> t1 t2 ...; one merge, since llama.cpp wants some."""
    import gguf
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<|endoftext|>", *(f"t{i}" for i in range(1, size))])
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (size - 1))
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def write_lora(folder, file):
    """A LoRA of PEFT's folder on a StarCoder."""
    import gguf
    writer = gguf.GGUFWriter(f"{file}.part", "starcoder")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = read_json(Path(folder, "adapter_config.json"))["lora_alpha"]
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    tensors, _ = load_tensors(str(Path(folder, "adapter_model.safetensors")))
    for name, tensor in tensors.items():   # base_model.model.LAYER.lora_A.weight
        layer, end = name.removeprefix("base_model.model.").split(".lora_")
        writer.add_tensor(f"{gguf_name(f'{layer}.weight')}.lora_{end[0].lower()}", tensor.numpy())
    write_all(writer, file)


def write_all(writer, file):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    Path(f"{file}.part").rename(file)


def start_server(file, slots, length, loras=(), cache="float32"):
    """The server in this process: `slots` requests at once, of `length` tokens each. A request uses
    the LoRAs that it names. cache: "float32", without flash attention, as in transformers, or
    "float16", llama.cpp's default."""
    import xllamacpp
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_parallel, settings.n_ctx = slots, slots * 64 * (length // 64 + 1)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    settings.warmup, settings.verbosity, settings.cache_ram_mib = False, -1, 0
    if cache == "float32":
        keep_float32(settings)
    settings.lora_init_without_apply = True
    settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0) for lora in loras]
    return xllamacpp.Server(settings)


def keep_float32(settings):
    """Keys and values in float32; flash attention would round them."""
    import xllamacpp
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED


def complete(server, new, prompt, lora=None):
    """`new` tokens after the ids of a prompt, greedily; by the base, or the LoRA of that number."""
    request = dict(prompt=prompt, max_tokens=new, temperature=0.0, ignore_eos=True,
                   cache_prompt=False)
    if lora is not None:
        request["lora"] = [dict(id=lora, scale=1.0)]
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    return [int(word) for word in re.findall(r"t(\d+)", answer["choices"][0]["text"])]
