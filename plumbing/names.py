"""What a reader calls what the code has a short name for: in tables, in legends, on axes."""
import re

METHODS = {   # kinds of adapters, bench.py's rows, table1's columns
    "base": "base model", "ia3": "IA3", "flora": "FLoRA", "lora": "LoRA", "hira": "HiRA",
    "ffba": "FFBA", "ia3-c_attn": "IA3 on c_attn", "flora-eq6": "FLoRA, Eq. 6 alone",
    "lora-token": "LoRA, bmm per token (the paper's)", "lora-example": "LoRA, bmm per example",
    "lora-masked": "LoRA, one dense matmul and a mask", "ffba-unfused": "FFBA, unfused"}
LANGUAGES = {
    "py": "Python", "pl": "Perl", "js": "JavaScript", "sh": "Bash", "lua": "Lua", "rb": "Ruby",
    "r": "R", "d": "D", "rs": "Rust", "rkt": "Racket", "jl": "Julia", "swift": "Swift",
    "cpp": "C++ headers", "cuda": "CUDA headers", "cmake": "CMake files", "pyi": "Python stubs",
    "cs": "Czech", "lt": "Lithuanian", "mr": "Marathi", "ar": "Arabic", "hi": "Hindi"}
MODELS = {
    "base": "the embedded model", "smollm2": "SmolLM2-135M", "starcoder": "StarCoder 15B's shape",
    "starcoderbase-1b": "StarCoderBase 1B's shape", "starcoderbase-3b": "StarCoderBase 3B's shape",
    "starcoderbase-7b": "StarCoderBase 7B's shape", "starcoder-cpu": "a small StarCoder",
    "tiny_starcoder_py": "tiny_starcoder_py's shape", "llama-cpu": "a small Llama",
    "llama-smollm2": "SmolLM2-135M's shape",
    "llama-2-7b": "Llama-2 7B's shape", "llama-2-13b": "Llama-2 13B's shape"}


def full_name(name):
    """"lora-token", "flora-r4", "flora4:bfloat16", "pl", "humaneval-pl.jsonl" -> what a reader
    calls it; a name of somebody else's as it is."""
    known = METHODS | LANGUAGES
    first, *rest = re.sub(r"^(humaneval-)?(\w+)\.jsonl$", r"\2", name).split(":")
    ranked = re.fullmatch(r"(flora|lora|hira|ffba)(-r)?(\d+)", first)
    told = f"{METHODS[ranked[1]]} r{ranked[3]}" if ranked else known.get(first, first)
    return ", ".join([told, *rest])


def model_name(name):
    """bench.py's name of a model: a size, a folder, or a size "..., random weights"."""
    size, *rest = name.split(", ")
    return ", ".join([MODELS.get(size, size), *rest])
