"""Which name an unknown key or flag most likely means.

It imports nothing of the project: config.py imports it.
"""

import difflib
from collections.abc import Collection, Sequence
from typing import Any

# Names that other tools and papers use for a key, if they are not spelt like the key.
USUAL_NAMES = {
    "model_name": ("model", "base_model", "model_id", "model_name_or_path", "pretrained_model_name_or_path"),
    "load_in_4bit": ("use_4bit", "4bit", "bits"),
    "quant_type": ("bnb_4bit_quant_type",),
    "compute_dtype": ("dtype", "torch_dtype", "bnb_4bit_compute_dtype", "bf16", "fp16"),
    "use_double_quant": ("double_quant", "bnb_4bit_use_double_quant"),
    "rank": ("r", "lora_r", "lora_rank"),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout",),
    "init_adapter": ("adapter_name_or_path", "init_lora", "start_adapter"),
    "target_modules": ("targets", "lora_target", "lora_targets", "lora_target_modules"),
    "dataset": ("data", "dataset_name", "dataset_path", "train_file", "data_path"),
    "max_length": ("seq_len", "seq_length", "seqlen", "sequence_length", "sequence_len", "max_seq_length")
    + ("max_seq_len", "model_max_length", "block_size", "context_length", "cutoff_len"),
    "packing": ("sample_packing",),
    "max_train_samples": ("num_samples", "max_samples"),
    "num_epochs": ("epochs", "epoch", "num_train_epochs"),
    "max_steps": ("steps", "num_steps", "max_iters"),
    "batch_size": ("micro_batch_size", "train_batch_size", "per_device_train_batch_size", "per_device_batch_size"),
    "gradient_accumulation_steps": ("grad_accum", "accumulation_steps", "gradient_accumulation", "grad_acc"),
    "learning_rate": ("lr", "max_lr", "peak_lr"),
    "lr_scheduler": ("scheduler", "lr_scheduler_type", "schedule"),
    "warmup_ratio": ("warmup", "warmup_steps"),
    "max_grad_norm": ("grad_clip", "clip", "gradient_clipping"),
    "optim": ("optimizer",),
    "eval_steps": ("eval_every", "eval_interval"),
    "save_steps": ("save_every", "save_interval"),
    "early_stopping_patience": ("patience", "early_stopping"),
    "resume": ("resume_from_checkpoint",),
    "output_dir": ("out", "out_dir", "output_folder"),
    "report_to": ("wandb", "log_with", "tracker"),
    "max_new_tokens": ("max_tokens", "new_tokens", "num_predict"),
    "temperature": ("temp",),
    "system_prompt": ("system",),
    "adapter": ("output_dir", "peft_model", "lora_path", "adapter_path"),  # a flag of the scripts
}


def word(key: Any) -> str:
    """Return an unknown key, flag or argument as a message shows it: cut, and quoted if it is no word at all."""
    word = str(key) if len(str(key)) <= 80 else f"{str(key)[:80]}…"
    return word if word.isprintable() and word.strip() else repr(word)


def usual(word: str, keys: Collection[str]) -> str | None:
    """Return the one key that other tools call `word`, or whose initials `word` is (`bs`: batch_size); else None.

    keys: those of all settings.
    """
    word = word.replace("-", "_").lower().rpartition(".")[2]
    initials = [key for key in keys if "_" in key and "".join(part[0] for part in key.split("_")) == word]
    called = [key for key, names in USUAL_NAMES.items() if word in names] or initials
    return called[0] if len(called) == 1 else None


def nearest(word: str, known: Sequence[str], keys: Collection[str]) -> str:
    """Return `; did you mean …?` with the name in `known` that `word` most likely means, or an empty text.

    keys: those of all settings.
    """
    word = str(word)[:80]
    dashes = "--" if word.startswith("--") else ""
    called = dashes + (usual(word[len(dashes) :], keys) or "")
    written = word.replace("-", "_") if not dashes else dashes + word[2:].replace("-", "_")
    match = [called] if called in known else difflib.get_close_matches(written, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""
