"""The case `unsloth` of bench_moe.py, in a process of its own, since Unsloth needs another transformers than the toolkit.

Unsloth reads a checkpoint. The disk need not hold one of 57 GiB: a single layer is written, in the layout of Qwen3-30B-A3B's files,
and each layer of the model reads that one, so all have the same weights, which changes neither speed nor memory.
"""

import gc
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import unsloth  # noqa: F401  (must be imported before transformers)

# isort: split
import bitsandbytes as bnb
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig
from unsloth import FastLanguageModel

GIB = 2**30
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TOKENIZER = Path(__file__).resolve().parents[2] / "tiny" / "model"  # any will do: the tokens are random ids


class OneLayer:
    """A file of weights whose layer 0 stands for each of so many layers."""

    layers = 1

    def __init__(self, *args, **kwargs):
        self.file = safe_open(*args, **kwargs)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def keys(self):
        names = self.file.keys()
        further = [f"layers.{number}." for number in range(1, self.layers)]
        return [*names, *(name.replace("layers.0.", to) for to in further for name in names if "layers.0." in name)]

    def get_slice(self, name):
        number = name.partition("layers.")[2].partition(".")[0]
        return self.file.get_slice(name.replace(f"layers.{number}.", "layers.0.") if number else name)


def tensors(shape: dict):
    """Yield the names and shapes of a checkpoint's tensors: those of one layer, and those outside of layers."""
    width, inner, head = shape["hidden_size"], shape["moe_intermediate_size"], shape["head_dim"]
    q, kv = head * shape["num_attention_heads"], head * shape["num_key_value_heads"]
    yield from ((f"{name}.weight", (shape["vocab_size"], width)) for name in ("model.embed_tokens", "lm_head"))
    yield "model.norm.weight", (width,)
    layer = "model.layers.0."
    yield from ((f"{layer}{name}.weight", (width,)) for name in ("input_layernorm", "post_attention_layernorm"))
    yield from ((f"{layer}self_attn.{name}_norm.weight", (head,)) for name in "qk")
    linears = {"q_proj": (q, width), "k_proj": (kv, width), "v_proj": (kv, width), "o_proj": (width, q)}
    yield from ((f"{layer}self_attn.{name}.weight", size) for name, size in linears.items())
    yield f"{layer}mlp.gate.weight", (shape["num_experts"], width)
    for number in range(shape["num_experts"]):
        expert = f"{layer}mlp.experts.{number}."
        yield f"{expert}gate_proj.weight", (inner, width)
        yield f"{expert}up_proj.weight", (inner, width)
        yield f"{expert}down_proj.weight", (width, inner)


def write(shape: dict, layers: int, folder: Path) -> None:
    """Write config.json, the weights and a tokenizer."""
    Qwen3MoeConfig(
        **shape, num_hidden_layers=layers, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"]
    ).save_pretrained(folder)
    made = {}
    for name, size in tensors(shape):
        made[name] = torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size, device=DEVICE)
    made = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in made.items()}
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)


def load(case: dict) -> torch.nn.Module:
    """Return the model with its adapter, as Unsloth documents it."""
    with tempfile.TemporaryDirectory() as folder:
        write(case["shape"], case["layers"], Path(folder))
        OneLayer.layers = case["layers"]
        transformers.modeling_utils.safe_open = OneLayer
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=case["length"], dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
        )
        lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0, "target_modules": ATTENTION, "bias": "none"}
        return FastLanguageModel.get_peft_model(model, **lora, use_gradient_checkpointing=True)


def main(case: dict) -> dict:
    """Return the row of the case."""
    torch.manual_seed(0)
    began = time.perf_counter()
    model = load(case)
    row = {"case": case["name"], "layers": case["layers"], "load_s": round(time.perf_counter() - began, 1)}
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    packed = sum(isinstance(p, bnb.nn.Params4bit) for p in experts)
    row["experts"] = f"{packed} of {len(experts)} tensors in 4 bit, {sum(p.nbytes for p in experts) / GIB:.2f} GiB"
    model.train()
    optimizer = bnb.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    gc.collect()
    torch.cuda.empty_cache()
    row["loaded_gib"] = round(torch.cuda.memory_allocated() / GIB, 2)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, 4096, (1, case["length"]), device=DEVICE)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    def wait() -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    losses = [step() for _ in range(3)]  # compile
    wait()
    print("READY", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    losses += [step() for _ in range(case["steps"])]
    wait()
    row["tokens_s"] = round(case["steps"] * case["length"] / (time.perf_counter() - began), 1)
    row["first_loss"], row["last_loss"] = (round(float(loss), 3) for loss in (losses[0], losses[-1]))
    row["peak_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    row["allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    return row


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(json.loads(sys.argv[2]))), flush=True)
