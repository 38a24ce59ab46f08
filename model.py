"""StarCoder (GPTBigCode) in one file: the transformer, its KV cache, Hugging Face folders, tokenizers.

Pre-LayerNorm, learned positions, multi-query attention (one key/value head for all query heads),
tanh-GELU MLP, biases everywhere, output embedding tied to the input's. The four projections of each
block are `flora.AdapterLinear`, so every row of a batch may run its own adapter.

Shapes: B batch, T tokens, S cached tokens, C = n_embd, H = n_head, D = C / H.
"""
import hashlib
import json
import os
import pickle
import shutil
import sys
import zipfile
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

from flora import AdapterLinear, BadInput, PackedCopies, adapter_layers, matmul, packed_columns, save_tensors


@dataclass
class GPTConfig:
    """Sizes by Hugging Face's names. The defaults are StarCoder's, 15B parameters."""
    vocab_size: int = 49152
    n_positions: int = 8192       # context length, in tokens
    n_embd: int = 6144
    n_layer: int = 40
    n_head: int = 48
    n_inner: int = 24576
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    eos_token_id: int = 0         # <|endoftext|>
    activation_function: str = "gelu_pytorch_tanh"   # the 15B checkpoint says "gelu": the exact one


PRESETS = {
    "tiny_starcoder_py": GPTConfig(n_embd=768, n_layer=20, n_head=12, n_inner=3072),
    "starcoderbase-1b": GPTConfig(n_embd=2048, n_layer=24, n_head=16, n_inner=8192),
    "starcoderbase-3b": GPTConfig(n_embd=2816, n_layer=36, n_head=22, n_inner=11264),
    "starcoderbase-7b": GPTConfig(n_embd=4096, n_layer=42, n_head=32, n_inner=16384),
    "starcoder": GPTConfig(activation_function="gelu"),
}


def attend(q, k, v, mask=None, flash=True):
    """Multi-query attention: q [B, H, T, D] over one key/value head k, v [B, S, D] -> [B, H, T, D].

    mask [B, T, S], in q's dtype: 0 where a query may look, else -inf; None is causal, with S = T.
    flash=False writes the scores out, as the paper's measurements did (no FlashAttention). With one
    key head all query heads are rows of one matmul, which for one token on a CPU is the faster way.
    """
    B, H, T, D = q.shape
    mask = None if mask is None else mask[:, None]                            # [B, 1, T, S]
    if flash and not (T == 1 and q.device.type == "cpu"):
        k, v = k[:, None].expand(B, H, -1, D), v[:, None].expand(B, H, -1, D)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    if mask is None:
        mask = torch.full((T, T), float("-inf"), device=q.device).triu(1)
    scores = (q.reshape(B, H * T, D) @ k.mT).view(B, H, T, -1)
    weights = torch.add(mask, scores.float(), alpha=D**-0.5).softmax(-1).to(q.dtype)   # [B, H, T, S]
    return (weights.view(B, H * T, -1) @ v).view(B, H, T, D)


def activation(config):
    """The activation of the MLP: the exact GELU, or its tanh approximation."""
    return partial(F.gelu, approximate="none" if config.activation_function == "gelu" else "tanh")


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, self.n_head = config.n_embd, config.n_head
        self.head_dim = C // config.n_head
        self.flash = True
        self.activation = activation(config)   # for an FFBA adapter that asks for it
        self.c_attn = AdapterLinear(C, C + 2 * self.head_dim)  # rows: [query C | key D | value D]
        self.c_proj = AdapterLinear(C, C)

    def forward(self, x, adapter_ids, kv_cache, index, mask):
        B, T, C = x.shape
        D = self.head_dim
        qkv, hidden = self.c_attn.with_hidden(x, adapter_ids, self.activation)   # hidden: FFBA's, for c_proj
        q, k, v = qkv.split([C, D, D], dim=-1)
        q = q.view(B, T, self.n_head, D).transpose(1, 2)                      # [B, H, T, D]
        if kv_cache is not None:  # [2, B, S, D]
            if index is None:  # prefill: the cache is empty, attend among the new tokens
                kv_cache[0, :, :T], kv_cache[1, :, :T] = k, v
            else:              # decode: attend to all that each row has cached so far
                kv_cache[0][index], kv_cache[1][index] = k, v
                k, v = kv_cache
        y = attend(q, k, v, mask, self.flash)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C), adapter_ids, hidden=hidden)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = AdapterLinear(config.n_embd, config.n_inner)
        self.c_proj = AdapterLinear(config.n_inner, config.n_embd)
        self.activation = activation(config)

    def forward(self, x, adapter_ids):
        y, hidden = self.c_fc.with_hidden(x, adapter_ids, self.activation)
        return self.c_proj(self.activation(y), adapter_ids, hidden=hidden)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, adapter_ids=None, kv_cache=None, index=None, mask=None):
        x = x + self.attn(self.ln_1(x), adapter_ids, kv_cache, index, mask)
        return x + self.mlp(self.ln_2(x), adapter_ids)


class GPT(nn.Module):
    """The language model. Parameters carry Hugging Face's names (`transformer.h.0.attn.c_attn.weight`)."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise BadInput(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.config = config
        self.gradient_checkpointing = False   # recompute each block in backward, to save memory
        self.packed = None                    # flora.PackedCopies once it serves on a CPU
        self._fingerprint = None
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.n_positions, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon),
        ))
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:  # residual projections start smaller, as in GPT-2
                depth = 2 * config.n_layer if "c_proj" in name else 1
                nn.init.normal_(p, std=config.initializer_range / depth**0.5)

    def hidden(self, ids, adapter_ids=None, kv_cache=None, positions=None):
        """All of `forward` but the output embedding -> [B, T, C]."""
        B, T = ids.shape
        if T > self.config.n_positions:
            raise BadInput(f"{T} tokens are more than the model's context of "
                           f"{self.config.n_positions} (n_positions); shorten or truncate the prompt")
        wpe = self.transformer.wpe
        x = self.transformer.wte(ids)                                         # [B, T, C]
        x = x + (wpe.weight[:T] if positions is None else wpe(positions))
        index = mask = None
        if positions is not None and kv_cache is not None:
            index = torch.arange(B, device=ids.device)[:, None], positions     # where k and v go
            unseen = torch.arange(kv_cache.shape[3], device=ids.device) > positions[:, :, None]
            mask = torch.zeros_like(unseen, dtype=x.dtype).masked_fill(unseen, float("-inf"))
        for i, block in enumerate(self.transformer.h):
            layer_cache = None if kv_cache is None else kv_cache[i]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, adapter_ids, use_reentrant=False)
            else:
                x = block(x, adapter_ids, layer_cache, index, mask)
        return self.transformer.ln_f(x)

    def lm_head(self, x):
        """x [..., C] -> logits [..., vocab_size], by the tied input embedding."""
        return matmul(x, packed_columns(self.transformer.wte.weight, self.packed))

    def forward(self, ids, adapter_ids=None, kv_cache=None, positions=None):
        """ids int64 [B, T] -> logits [B, T, vocab_size], in the model's dtype.

        adapter_ids: int64 [B] or [B, T], 0 for the base model; None is the base model for all.
        kv_cache: from `new_kv_cache`, written in place. Without `positions` it is filled from its
        start (prefill; pad shorter rows on the right, causality keeps the padding out of sight).
        With positions int64 [B, T], each row's tokens are written there and see what that row has
        cached up to them (decode).
        """
        return self.lm_head(self.hidden(ids, adapter_ids, kv_cache, positions))

    def new_kv_cache(self, batch, length):
        """An empty static cache [n_layer, 2, B, S, D], in the model's dtype, for `length` = S tokens."""
        c, weight = self.config, self.transformer.wte.weight
        return torch.zeros(c.n_layer, 2, batch, length, c.n_embd // c.n_head,
                           dtype=weight.dtype, device=weight.device)

    def set_attention(self, flash):
        """Choose F.scaled_dot_product_attention (True) or plain math (False), as `attend` explains."""
        for block in self.transformer.h:
            block.attn.flash = flash

    def pack(self):
        """Serve with packed weights where that is faster (flora.matmul): on a CPU, in float32. Costs
        a second copy of the weights, made at first use; training ignores it."""
        weight = self.transformer.wte.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and self.packed is None \
                and torch.backends.mkldnn.is_available():
            for module in [self, *(layer for _, layer in adapter_layers(self))]:
                module.packed = PackedCopies()

    def base_parameters(self):
        """{name: parameter} of the base model, adapters left out."""
        return {name: p for name, p in self.named_parameters() if ".adapters." not in name}

    @property
    def fingerprint(self):
        """16 hexadecimal digits that tell this base model from others, from a sample of its weights
        as they were stored (so a load in another dtype keeps it)."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint({n: sample(p) for n, p in self.base_parameters().items()})
        return self._fingerprint

    @fingerprint.setter
    def fingerprint(self, value):
        self._fingerprint = value

    # ------------------------------------------------------------------ Hugging Face folders

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """Load a Hugging Face GPTBigCode folder: config.json and weights as safetensors or
        pytorch_model*.bin (never unpickled beyond tensors), in one file or in shards.

        Each tensor is read into place in `dtype`, so memory peaks near one copy of the model.
        Raises BadInput, naming the file or key, for what is missing, misshaped or not StarCoder.
        """
        with torch.device("meta"):
            model = cls(read_config(folder))
        model = model.to(dtype).to_empty(device=device)
        parameters, samples = model.base_parameters(), {}
        for file, name, tensor in stored_tensors(folder):
            if name == "lm_head.weight":  # a copy of the tied embedding
                continue
            if name not in parameters:
                raise BadInput(f"{file}: unexpected tensor {name}; the model of {folder}/config.json "
                               "has no such parameter")
            if parameters[name].shape != tensor.shape:
                raise BadInput(f"{file}: {name} has shape {list(tensor.shape)}, but config.json "
                               f"needs {list(parameters[name].shape)}")
            parameters[name].data.copy_(tensor)
            samples[name] = sample(tensor)
        missing = sorted(parameters.keys() - samples.keys())
        if missing:
            raise BadInput(f"{folder}: tensor {missing[0]} is missing from the weight files"
                           + (f", and {len(missing) - 1} more" if missing[1:] else ""))
        model.fingerprint = fingerprint(samples)
        return model

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and model.safetensors that Hugging Face transformers opens.

        dtype: the stored one (None keeps the model's). Adapters are not written: merge one first,
        or use flora.save_adapter.
        """
        os.makedirs(folder, exist_ok=True)
        tensors = {name: p.detach().to(dtype or p.dtype).contiguous().cpu()
                   for name, p in self.base_parameters().items()}
        stored = tensors["transformer.wte.weight"].dtype
        config = asdict(self.config) | dict(
            model_type="gpt_bigcode", architectures=["GPTBigCodeForCausalLM"], multi_query=True,
            scale_attn_weights=True,
            tie_word_embeddings=True, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
            bos_token_id=self.config.eos_token_id, torch_dtype=str(stored).removeprefix("torch."))
        save_tensors(tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"})
        write_json(os.path.join(folder, "config.json"), config)


def sample(tensor):
    """64 values spread over a tensor, as float32 bytes with its shape."""
    flat = tensor.detach().reshape(-1)
    picked = flat[torch.linspace(0, flat.numel() - 1, 64, dtype=torch.float64).long()]
    return str(list(tensor.shape)).encode() + picked.float().cpu().numpy().tobytes()


def fingerprint(samples):
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(name.encode() + samples[name])
    return digest.hexdigest()[:16]


def read_json(file):
    try:
        with open(file, encoding="utf-8") as f:
            value = json.load(f)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except FileNotFoundError:
        raise BadInput(f"{file}: no such file") from None
    except (OSError, ValueError) as e:
        raise BadInput(f"{file}: not readable as JSON ({e})") from None


def read_config(folder):
    """The GPTConfig of a Hugging Face folder; BadInput names the key that is not StarCoder's."""
    if not os.path.isdir(folder):
        raise BadInput(f"{folder}: no such model folder")
    file = os.path.join(folder, "config.json")
    config = read_json(file)
    supported = {"model_type": ["gpt_bigcode"], "multi_query": [True], "scale_attn_weights": [True],
                 "tie_word_embeddings": [True], "activation_function": ["gelu_pytorch_tanh", "gelu"]}
    for key, values in supported.items():
        if config.get(key, None if key == "model_type" else values[0]) not in values:
            raise BadInput(f"{file}: {key} is {config.get(key)!r}, but only "
                           f"{' or '.join(map(repr, values))} is supported")
    fields = {key: config[key] for key in GPTConfig.__dataclass_fields__ if config.get(key) is not None}
    if "n_inner" not in fields and isinstance(fields.get("n_embd"), int):
        fields["n_inner"] = 4 * fields["n_embd"]
    for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
        if type(fields.get(key)) is not int or fields[key] < 1:
            raise BadInput(f"{file}: {key} is {fields.get(key)!r}, but must be a positive whole number")
    return GPTConfig(**fields)


def stored_tensors(folder):
    """Yield (file, name, CPU tensor) for every tensor of a folder, one at a time."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        file = os.path.join(folder, f"{stem}.{ending}")
        index = f"{file}.index.json"
        if os.path.exists(file):
            files = [file]
        elif os.path.exists(index):
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise BadInput(f"{index}: has no weight_map; download it again")
            shards = sorted(set(weight_map.values()))
            files = [os.path.join(folder, os.path.basename(shard)) for shard in shards]
        else:
            continue
        for shard in files:
            if not os.path.exists(shard):
                raise BadInput(f"{shard}: this shard, named in {index}, is missing; download it again")
        for shard in files:
            try:
                if ending == "bin":
                    mmap = zipfile.is_zipfile(shard)  # files of torch before 1.6 are no zip
                    tensors = torch.load(shard, map_location="cpu", weights_only=True, mmap=mmap)
                    yield from ((shard, name, tensor) for name, tensor in tensors.items())
                else:
                    with safe_open(shard, "pt") as f:
                        for name in f.keys():
                            yield shard, name, f.get_tensor(name)
            except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError,
                    AttributeError) as e:
                reason = (str(e) or type(e).__name__).splitlines()[0]
                raise BadInput(f"{shard}: truncated or not a weight file ({reason}); download it again"
                               ) from e
        return
    raise BadInput(f"{folder}: holds neither model.safetensors nor pytorch_model.bin, nor an index of shards")


# -------------------------------------------------------------------------------------- tokenizers

FIM_TOKENS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")


class Tokenizer:
    """The tokenizer of a model folder: tokenizer.json (StarCoder's, by `tokenizers`) or
    tokenizer.model (the embedded model's, by `sentencepiece`). decode(encode(text)) == text.

    eos_id: <|endoftext|>. fim_ids: the ids of FIM_TOKENS, or None.
    """

    def __init__(self, folder):
        self.files = [f for f in (os.path.join(folder, name) for name in
                                  ("tokenizer.json", "tokenizer.model")) if os.path.isfile(f)]
        if not self.files:
            raise BadInput(f"{folder}: holds neither tokenizer.json nor tokenizer.model")
        try:
            if self.files[0].endswith(".json"):
                from tokenizers import Tokenizer as HFTokenizer
                self.hf, self.sp = HFTokenizer.from_file(self.files[0]), None
            else:
                from sentencepiece import SentencePieceProcessor
                self.hf, self.sp = None, SentencePieceProcessor(model_file=self.files[0])
        except Exception as e:  # tokenizers raises plain Exception
            raise BadInput(f"{self.files[0]}: not a readable tokenizer ({e})") from e
        self.eos_id = self.token_id("<|endoftext|>")
        if self.eos_id is None:
            raise BadInput(f"{self.files[0]}: has no <|endoftext|> token")
        fim_ids = [self.token_id(token) for token in FIM_TOKENS]
        self.fim_ids = None if None in fim_ids else fim_ids

    def token_id(self, token):
        if self.hf:
            return self.hf.token_to_id(token)
        i = self.sp.piece_to_id(token)
        return None if i == self.sp.unk_id() else i

    @property
    def vocab_size(self):
        return self.hf.get_vocab_size() if self.hf else self.sp.vocab_size()

    def encode(self, text):
        """text -> list of ids, no special token added."""
        if self.hf:
            return self.hf.encode(text, add_special_tokens=False).ids
        # sentencepiece writes a space as ▁, so that a ▁ of the text must go in as its UTF-8 bytes
        low_line = [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        first, *rest = (self.sp.encode(part) for part in text.split("▁"))
        return first + [i for part in rest for i in low_line + part]

    def decode(self, ids):
        """list of ids -> text; bytes that are no UTF-8 become U+FFFD."""
        ids = list(ids)
        return self.hf.decode(ids, skip_special_tokens=False) if self.hf else self.sp.decode(ids)

    def save(self, folder):
        """Copy the tokenizer's file into another model folder."""
        for file in self.files:
            if not os.path.exists(os.path.join(folder, os.path.basename(file))):
                shutil.copy(file, folder)


# ------------------------------------------------------------------------- what every script shares

EMBEDDED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "base")


def add_common_flags(parser, dtypes):
    """--weights, --device, --dtype, --seed and --json, with the same meaning in every script."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--weights", metavar="FOLDER", default=EMBEDDED,
                        help="base model, a Hugging Face folder (default: the embedded one)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16" if cuda else "float32",
                        help="default: bfloat16 on cuda, else float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the results there as JSON")


def get_device(name):
    """"cpu", "cuda", "cuda:1" -> torch.device; BadInput where this machine has no such device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise BadInput(f"--device {name}: not usable here ({str(e).splitlines()[0]})") from None
    return torch.device(name)


def write_json(file, value):
    """Write a JSON file whole: under a temporary name, then renamed."""
    try:
        with open(f"{file}.tmp", "w", encoding="utf-8") as f:
            json.dump(value, f, indent=1)
            f.write("\n")
        os.replace(f"{file}.tmp", file)
    except OSError as e:
        raise BadInput(f"{file}: cannot be written ({e.strerror})") from None


def run_main(main):
    """Run a script's main(): bad input is one sentence and exit status 2, Ctrl-C is status 130."""
    try:
        main()
    except BadInput as e:
        print(f"{os.path.basename(sys.argv[0])}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
