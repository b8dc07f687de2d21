"""The true shapes of models whose speed and memory are measured with random weights, which change neither.

python tests/benchmarks/shapes.py gemma-2-2b OUT      write one (a CUDA GPU makes its weights; without one, slowly)
"""

import contextlib
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tiny" / "model"  # any will do: cases are random ids


def sizes(vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int, head: int, **rest) -> dict:
    """Return the names that transformers gives to a model's sizes."""
    return {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **rest,
    }  # fmt: skip


ONES = [1.0] * 48  # factors of the rotary frequencies
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "short_factor": ONES,
    "long_factor": ONES, "original_max_position_embeddings": 4096,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
GRANITE = {
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.015625, "logits_scaling": 8.0
}  # fmt: skip
# Of the config.json of google/gemma-2-2b, google/gemma-3-4b-pt (its text part), microsoft/Phi-4-mini-instruct,
# HuggingFaceTB/SmolLM3-3B, allenai/OLMo-2-0425-1B and -1124-7B, ibm-granite/granite-3.3-2b-instruct and
# mistralai/Ministral-8B-Instruct-2410, meta-llama/Llama-3.1-8B, meta-llama/Llama-3.2-3B, Qwen/Qwen2.5-7B,
# Qwen/Qwen3-4B. name: (prefix of transformers' classes, sizes)
SHAPES = {
    "gemma-2-2b": ("Gemma2", sizes(256_000, 2304, 9216, 26, 8, 4, 256, query_pre_attn_scalar=256)),
    "gemma-3-4b": ("Gemma3", sizes(262_208, 2560, 10240, 34, 8, 4, 256, sliding_window=1024)),
    "phi-4-mini": (
        "Phi3",
        sizes(
            200_064, 3072, 8192, 32, 24, 8, 128, rope_parameters=LONGROPE, max_position_embeddings=131_072,
            tie_word_embeddings=True,
        ),
    ),
    "smollm3-3b": ("SmolLM3", sizes(128_256, 2048, 11008, 36, 16, 4, 128, tie_word_embeddings=True)),
    "olmo-2-1b": ("Olmo2", sizes(100_352, 2048, 8192, 16, 16, 16, 128)),
    "olmo-2-7b": ("Olmo2", sizes(100_352, 4096, 11008, 32, 32, 32, 128)),
    "granite-3.3-2b": ("Granite", sizes(49_159, 2048, 8192, 40, 32, 8, 64, tie_word_embeddings=True, **GRANITE)),
    "llama-3.2-3b": (
        "Llama", sizes(128_256, 3072, 8192, 28, 24, 8, 128, rope_parameters=LLAMA3 | {"factor": 32.0}, tie_word_embeddings=True)
    ),
    "qwen3-4b": ("Qwen3", sizes(151_936, 2560, 9728, 36, 32, 8, 128, tie_word_embeddings=True)),
    "llama-3.1-8b": ("Llama", sizes(128_256, 4096, 14336, 32, 32, 8, 128, rope_parameters=LLAMA3)),
    "qwen2.5-7b": ("Qwen2", sizes(152_064, 3584, 18944, 28, 28, 4, 128)),
    "ministral-8b": ("Ministral", sizes(131_072, 4096, 12288, 36, 32, 8, 128, sliding_window=32_768)),
}  # fmt: skip


def configuration(name: str):
    """Return transformers' configuration of a shape."""
    import transformers

    prefix, own = SHAPES[name]
    kind = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
    return kind(**own, dtype="bfloat16")


COUNTING = threading.Lock()  # a thread that imports transformers while another one does may find half of it


def parameters(name: str) -> int:
    """Return the number of a shape's parameters; tied ones count once."""
    with COUNTING:
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(configuration(name))
        model.tie_weights()
        return sum(p.numel() for p in model.parameters())


def make(name: str, folder: Path) -> None:
    """Write a model of a shape with random weights, in bfloat16, and a tokenizer into a folder."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(configuration(name), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder)


@contextlib.contextmanager
def folder_of(name: str) -> Iterator[Path]:
    """Yield the folder of a model: `name` itself if it is one, else of the shape of this name, removed afterwards.

    It is made in main memory (/dev/shm) if that has room for it, so that no disk is waited for.
    """
    if name not in SHAPES:
        if not (Path(name) / "config.json").is_file():
            sys.exit(f"MODEL: expected the folder of a model, or one of {', '.join(SHAPES)}; got {name}")
        yield Path(name)
        return
    places = [place for place in ("/dev/shm", tempfile.gettempdir()) if Path(place).is_dir()]
    needed = 2.2 * parameters(name)
    place = next((place for place in places if shutil.disk_usage(place).free > needed), None)
    if place is None:
        sys.exit(f"MODEL: {name} needs {needed / 1e9:.1f} GB in one of {', '.join(places)}")
    with tempfile.TemporaryDirectory(dir=place) as parent:
        folder = Path(parent) / name
        subprocess.run([sys.executable, __file__, name, str(folder)], check=True)
        yield folder


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(f"usage: shapes.py NAME OUT; NAME is one of {', '.join(SHAPES)}")
    make(sys.argv[1], Path(sys.argv[2]))
