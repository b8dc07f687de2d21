"""Adapters that a stranger could send: a folder for --adapter, with whatever may lie in one."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.faults.adversary import CODE, ROOT, Attack, Ended, Ground, ask

Change = Callable[[Path], Any]
MODEL = str(ROOT / "tiny" / "model")
TEXT = ROOT / "tiny" / "text" / "validation.txt"
EVALUATE = ("--evaluate", "--max_length", 32, "--max_eval_samples", 20)
INSIDE, JSON, TENSORS = "lies in the adapter's folder", "adapter_config.json: ", "adapter_model.safetensors"


def asked(change: Change, *flags: object, **keywords: Any) -> Callable[[Path, Ground], Attack]:
    """Return a function that changes an adapter's folder, evil, and asks it for an answer; refused unless codes say so."""

    def build(folder: Path, ground: Ground) -> Attack:
        change(ground.copy("finished", folder / "evil"))
        return ask("--adapter", "evil", *flags, **{"codes": (2,), **keywords})

    return build


def evaluated(change: Change, *flags: object, **keywords: Any) -> Callable[[Path, Ground], Attack]:
    """Return a function that changes an adapter's folder and evaluates it, which may write there."""

    def build(folder: Path, ground: Ground) -> Attack:
        change(ground.copy("finished", folder / "evil"))
        keywords.setdefault("codes", (2,))
        return Attack("train_qlora", [*EVALUATE, "--adapter", "evil", *flags], output_dir="evil", **keywords)

    return build


def used(change: Change, *flags: object, **keywords: Any) -> Callable[[Path, Ground], Attack]:
    """Return a function that changes an adapter's folder and uses it in another mode than text, where code is refused."""

    def build(folder: Path, ground: Ground) -> Attack:
        change(ground.copy("finished", folder / "evil"))
        return Attack("inference_example", ["--adapter", "evil", *flags], INSIDE, (2,), **keywords)

    return build


# ------------------------------------------------------------------------------------------------ config.yaml


def coded(base: Path, kind: str = "qwen2") -> Path:
    """Make a base whose Python would show that it ran. kind: its model_type; one that transformers lacks needs the code."""
    shutil.copytree(MODEL, base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (base / "config.json").write_text(json.dumps(config | {"auto_map": names, "model_type": kind}), encoding="utf-8")
    tokenizer = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer |= {"auto_map": {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    imports = "from transformers import Qwen2Config as Config, Qwen2ForCausalLM as Model, Qwen2Tokenizer as Tokenizer"
    (base / "own.py").write_text(f"{CODE}\n{imports}\n", encoding="utf-8")
    return base


def settings(text: str, base: str | None = None, recorded: str | None = None) -> Change:
    """Return a change of config.yaml. base: where in the folder one with code is put; recorded: in adapter_config.json."""

    def change(evil: Path) -> None:
        if base:
            coded(evil / base)
        if recorded:
            described(base_model_name_or_path=recorded)(evil)
        (evil / "config.yaml").write_text(text.replace("EVIL", str(evil)), encoding="utf-8")

    return change


def replaced(name: str, make: Callable[[Path], Any]) -> Change:
    """Return a change that puts something else in the place of a file. make: gets its path."""

    def change(evil: Path) -> None:
        (evil / name).unlink(missing_ok=True)
        make(evil / name)

    return change


def link(to: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(to)


def here(change: Change, *flags: object, **keywords: Any) -> Callable[[Path, Ground], Attack]:
    """Return a function that makes the current folder itself the adapter."""

    def build(folder: Path, ground: Ground) -> Attack:
        shutil.copytree(ground.finished, folder, dirs_exist_ok=True)
        change(folder)
        return ask("--adapter", ".", *flags, **{"codes": (2,), **keywords})

    return build


def unchanged(folder: Path, ended: Ended) -> list[str]:
    """Return the files in the adapter's folder besides evaluation.json that were not there before."""
    known = {"config.yaml", "adapter_config.json", TENSORS, "training_log.txt", "training_curves.png", "metrics.jsonl"}
    known |= {
        "README.md",
        "evaluation.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    found = {path.name for path in (folder / "evil").iterdir() if not path.name.startswith("checkpoint-")}
    return [f"written: evil/{name}" for name in sorted(found - known)]


TRUST = "trust_remote_code: true"
NAMED = f"model: {{name: {MODEL}}}\n"
SETTINGS: dict[str, Callable[[Path, Ground], Attack]] = {
    "code in base": asked(settings(f"model: {{name: base, {TRUST}}}\n", "base"), says="but adapter_config.json"),
    "code in base, evaluated": evaluated(settings(f"model: {{name: base, {TRUST}}}\n", "base", "base"), says=INSIDE),
    "code in base, recorded too": asked(settings(f"model: {{name: base, {TRUST}}}\n", "base", "base"), says=INSIDE),
    "code in base, full path": asked(settings(f"model: {{name: EVIL/base, {TRUST}}}\n", "base"), says="EVIL|evil/base"),
    "code in base by a link": asked(
        lambda evil: (
            settings(f"model: {{name: link, {TRUST}}}\n", "base", "link")(evil),
            (evil / "link").symlink_to("base"),
        ),
        says=INSIDE,
    ),
    "code in the adapter's folder itself": asked(
        lambda evil: (
            (coded(evil / "base"), shutil.copytree(evil / "base", evil, dirs_exist_ok=True))
            and settings(f"model: {{name: ., {TRUST}}}\n", recorded=".")(evil)
        ),
        says="evil",
    ),
    "code in base, chat": used(settings(f"model: {{name: base, {TRUST}}}\n", "base", "base"), input="hello\n"),
    "code in base, demo": used(settings(f"model: {{name: base, {TRUST}}}\n", "base", "base"), "--mode", "demo"),
    "code in base, merge": used(
        settings(f"model: {{name: base, {TRUST}}}\n", "base", "base"), "--mode", "merge", "--output", "output"
    ),
    "code of the hub": asked(
        settings(f"model: {{name: attacker/model, {TRUST}}}\n", recorded="attacker/model"),
        says="cannot get attacker/model",
    ),
    "a base named by flag does not run": asked(
        lambda evil: coded(evil / "base", "unheard_of"),
        "--model_name",
        "evil/base",
        says="model.trust_remote_code: .*flag|true",
    ),
    "code that is not needed": asked(lambda evil: coded(evil / "base"), "--model_name", "evil/base", codes=(0,)),
    "a hub id that is a folder of the adapter": asked(
        settings(
            f"model: {{name: Qwen/Qwen2.5-3B-Instruct, {TRUST}}}\n",
            "Qwen/Qwen2.5-3B-Instruct",
            "Qwen/Qwen2.5-3B-Instruct",
        ),
        says=INSIDE,
    ),
    "a flag's hub id that is a folder of the adapter": asked(
        settings(NAMED, "Qwen/Some"),
        "--model_name",
        "Qwen/Some",
        "--trust_remote_code",
        "true",
        says="cannot get Qwen/Some from the hub",
    ),
    "the default's hub id in the current folder": here(
        lambda evil: (
            settings("", "Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct")(evil),
            (evil / "config.yaml").unlink(),
        ),
        says=INSIDE,
    ),
    "another base than the weights'": asked(
        settings("model: {name: attacker/model}\n"), says="but adapter_config.json"
    ),
    "a base at an address": asked(
        settings("model: {name: 'https://127.0.0.1/model'}\n", recorded="https://127.0.0.1/model"), says="address"
    ),
    "a base on a server": asked(settings("model: {name: //server/share}\n", recorded="//server/share"), says="address"),
    "a version whose code would run": asked(
        settings("model: {name: some/model, revision: refs/pr/1}\n", recorded="some/model"),
        "--trust_remote_code",
        "true",
        says="model.revision: ",
    ),
    "a folder to write in": asked(settings(f"{NAMED}training: {{output_dir: EVIL/../taken}}\n"), codes=(0,)),
    "a tracker": evaluated(
        settings(f"{NAMED}training: {{report_to: tensorboard}}\n"), "--dataset", TEXT, codes=(0,), check=unchanged
    ),
    "a checkpoint to load": evaluated(
        settings(f"{NAMED}training: {{resume: EVIL}}\n"), "--dataset", TEXT, codes=(0,), check=unchanged
    ),
    "data of the user": evaluated(settings(f"{NAMED}data: {{dataset: /etc/hostname}}\n"), says="give --dataset"),
    "data of an address": evaluated(
        settings(f"{NAMED}data: {{dataset: 'https://127.0.0.1/a.txt'}}\n"), says="give --dataset"
    ),
    "data, as if a run here had left it": evaluated(
        settings(f"{NAMED}data: {{dataset: {TEXT}}}\ntraining: {{output_dir: /proc/self/cwd/evil}}\n"),
        says="give --dataset",
    ),
    "data, as if a run beside had left it": evaluated(
        settings(f"{NAMED}data: {{dataset: {TEXT}}}\ntraining: {{output_dir: evil}}\n"), says="give --dataset"
    ),
    "no memory": asked(settings(f"{NAMED}performance: {{memory_limit_gib: 1.0e-9}}\n"), codes=(0,)),
    "an endless answer": asked(settings(f"{NAMED}generation: {{max_new_tokens: 100000000}}\n"), says="max_new_tokens"),
    "a very long answer": asked(settings(f"{NAMED}generation: {{max_new_tokens: 1000000}}\n"), codes=(0,)),
    "a system prompt": asked(settings(f"{NAMED}generation: {{system_prompt: '{{{{1/0}}}}'}}\n"), codes=(0,)),
    "a huge config.yaml": asked(settings("#" * 5_000_000), says="config.yaml: expected at most"),
    "config.yaml a link to a file of the user": asked(replaced("config.yaml", link("/etc/passwd")), says="config.yaml"),
    "config.yaml a link to zeros": asked(replaced("config.yaml", link("/dev/zero")), "--model_name", MODEL, codes=(0,)),
    "config.yaml a pipe": asked(replaced("config.yaml", os.mkfifo), "--model_name", MODEL, codes=(0,)),
    "config.yaml a folder": asked(replaced("config.yaml", Path.mkdir), "--model_name", MODEL, codes=(0,)),
    "config.yaml of bytes": asked(
        replaced("config.yaml", lambda path: path.write_bytes(b"\xff\x00" * 99)), says="config.yaml"
    ),
    "config.yaml with an object": asked(
        settings(f'model: !!python/object/apply:builtins.exec ["{CODE}"]\n'), says="config.yaml.*not valid YAML"
    ),
}

# ------------------------------------------------------------------------------------------------ adapter_config.json


def described(**changes: object) -> Change:
    """Return a change of adapter_config.json."""

    def change(evil: Path) -> None:
        path = evil / "adapter_config.json"
        tree = json.loads(path.read_text(encoding="utf-8")) | changes
        path.write_text(json.dumps(tree), encoding="utf-8")

    return change


def wrong(key: str, value: object, says: str | None = None, **more: object) -> Callable[[Path, Ground], Attack]:
    """Return an attack with one wrong value in adapter_config.json, whose key must be named."""
    return asked(described(**{key: value}, **more), says=JSON + key if says is None else says)


BOMB = "(([a-z_.0-9]*)*)*X"
CONFIGS: dict[str, Callable[[Path, Ground], Attack]] = {
    "targets: a bomb": wrong("target_modules", BOMB, "target_modules: expected a regular expression that takes less"),
    "exclusions: a bomb": wrong(
        "exclude_modules", BOMB, "exclude_modules: expected a regular expression that takes less"
    ),
    "ranks: a bomb": wrong("rank_pattern", {BOMB: 4}, "rank_pattern: expected a regular expression that takes less"),
    "alphas: a bomb": wrong("alpha_pattern", {BOMB: 4}, "alpha_pattern: expected a regular expression that takes less"),
    "targets: no expression": wrong("target_modules", "((", "target_modules: not a regular expression"),
    "alphas: no expression": wrong("alpha_pattern", {"((": 4}, "alpha_pattern: not a regular expression"),
    "targets: a repetition too large": wrong("target_modules", "a{99999999999}", "target_modules"),
    "targets: nested without end": wrong("target_modules", "(" * 5000 + ")" * 5000, "target_modules"),
    "targets: none": wrong("target_modules", "nothing", "matches no module"),
    "targets: numbers": wrong("target_modules", [1, 2]),
    "targets: a million": wrong("target_modules", ["q_proj"] * 100_000),
    "targets: the container": wrong("target_modules", "model\\.layers", "does not fit"),
    "targets: everything": wrong("target_modules", ".*", "does not fit"),
    "ranks: for a hundred thousand names": wrong("rank_pattern", {f"m{i}": 4 for i in range(100_000)}),
    "ranks: for many names": asked(described(rank_pattern={f"m{i}": 4 for i in range(5_000)}), codes=(0, 2)),
    "ranks: no number": wrong("rank_pattern", {"q_proj": "4"}),
    "ranks: huge": wrong("rank_pattern", {"q_proj": 10**7}, "rank"),
    "replication: without end": wrong("layer_replication", [[0, 2]] * 20_000),
    "replication: a thousand": wrong("layer_replication", [[0, 2]] * 900, "layer_replication"),
    "replication: a huge range": wrong("layer_replication", [[0, 2**30]], "layer_replication"),
    "replication: words": wrong("layer_replication", "0-4"),
    "layers' names: a bomb": wrong("layers_pattern", BOMB, layers_to_transform=[0]),
    "layers: words": wrong("layers_to_transform", ["first"]),
    "saved modules: a bomb": wrong("modules_to_save", [BOMB]),
    "saved modules: without their weights": wrong("modules_to_save", ["lm_head"], "does not fit"),
    "saved modules: all": wrong("modules_to_save", ["model"], "does not fit"),
    "biases: without their weights": wrong("bias", "all", "does not fit|only the"),
    "biases: a word": wrong("bias", "evil"),
    "tokens: far ones": wrong("trainable_token_indices", [2**30], "does not fit"),
    "tokens: negative": wrong("trainable_token_indices", [-1]),
    "tokens: of a bomb": wrong("trainable_token_indices", {BOMB: [0]}),
    "base: a number": wrong("base_model_name_or_path", 5),
    "base: a list": wrong("base_model_name_or_path", ["a", "b"]),
    "base: escapes": wrong("base_model_name_or_path", "a\x1b]52;c;aGk=\x07"),
    "base: a null byte": wrong("base_model_name_or_path", "a\0b"),
    "base: half a character": wrong("base_model_name_or_path", "a\ud800"),
    "alpha: NaN": wrong("lora_alpha", float("nan")),
    "alpha: infinite": wrong("lora_alpha", float("inf")),
    "alpha: 1e300": wrong("lora_alpha", 1e300, "lora_alpha"),
    "alpha: 1e30": wrong("lora_alpha", 1e30, "lora_alpha"),
    "alpha: negative": wrong("lora_alpha", -1),
    "alpha: a text": wrong("lora_alpha", "32"),
    "alpha: null": wrong("lora_alpha", None),
    "rank: a billion": wrong("r", 10**9, "r: "),
    "rank: 400 digits": wrong("r", 10**400, "r: "),
    "rank: true": wrong("r", True),
    "rank: a half": wrong("r", 4.5),
    "dropout: 2": wrong("lora_dropout", 2),
    "switch: a text": wrong("use_rslora", "yes"),
    "dora: without its weights": wrong("use_dora", True, "only the model has"),
    "method: prompts": wrong(
        "peft_type", "PROMPT_TUNING", num_virtual_tokens=4, tokenizer_kwargs={"trust_remote_code": True}
    ),
    "method: a mixture": wrong("peft_type", "XLORA", adapters={"a": "../.."}),
    "method: a list": wrong("peft_type", ["LORA"]),
    "task: a classifier": wrong("task_type", "SEQ_CLS"),
    "a module to import": wrong("megatron_config", {"a": 1}, '"megatron_config"', megatron_core="own"),
    "a class to import": asked(
        lambda evil: (
            coded(evil / "base"),
            described(auto_mapping={"base_model_class": "Model", "parent_library": "evil.base.own"})(evil),
        ),
        codes=(0,),
    ),
    "initial weights: decompositions": wrong("init_lora_weights", "pissa_niter_1000000000"),
    "initial weights: quantised": wrong("init_lora_weights", "loftq", loftq_config={"loftq_iter": 10**9}),
    "initial weights: a list": wrong("init_lora_weights", [1]),
    "a feature: activated": wrong("alora_invocation_tokens", [1, 2], '"alora_invocation_tokens"'),
    "a feature: arrow": wrong("arrow_config", {"top_k": 10**9}, '"arrow_config"'),
    "a feature: unknown": wrong("run", {"command": "touch canary"}, '"run"'),
    "a cache file to write": asked(
        described(corda_config={"cache_file": "taken", "covariance_file": "taken"}, eva_config={"a": 1}), codes=(0,)
    ),
    "huge": asked(described(padding="x" * 5_000_000), says="adapter_config.json: expected at most"),
    "deep": asked(
        replaced("adapter_config.json", lambda path: path.write_text("[" * 100_000)),
        says="cannot read .*adapter_config.json",
    ),
    "a number of 5,000 digits": asked(
        replaced("adapter_config.json", lambda path: path.write_text(f'{{"r": 1{"0" * 5000}}}')),
        says="adapter_config.json",
    ),
    "not UTF-8": asked(
        replaced("adapter_config.json", lambda path: path.write_bytes(b"\xff{}")), says="adapter_config.json"
    ),
    "a pipe": asked(replaced("adapter_config.json", os.mkfifo), says="no adapter_config.json"),
    "a link to zeros": asked(replaced("adapter_config.json", link("/dev/zero")), says="no adapter_config.json"),
    "a link to a file of the user": asked(
        replaced("adapter_config.json", link("/etc/passwd")), says="adapter_config.json"
    ),
    "a folder": asked(replaced("adapter_config.json", Path.mkdir), says="no adapter_config.json"),
}

# ------------------------------------------------------------------------------------------------ weights


def weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Return a change of the tensors. edit: changes the mapping, or returns another."""

    def change(evil: Path) -> None:
        tensors = load_file(evil / TENSORS)
        save_file(edit(tensors) or tensors, evil / TENSORS)

    return change


def first(edit: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Return a change of the first tensor."""
    return weights(lambda tensors: tensors.update({min(tensors): edit(tensors[min(tensors)]).contiguous()}))


def header(content: bytes | dict, length: int | None = None, body: bytes = b"") -> Change:
    """Return a change that writes a safetensors file by hand: its header, the length that is claimed, and the numbers."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    whole = struct.pack("<Q", len(text) if length is None else length) + text + body
    return lambda evil: (evil / TENSORS).write_bytes(whole)


class Runs:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return exec, (CODE,)


def pickled(evil: Path) -> None:
    (evil / "adapter_model.bin").write_bytes(pickle.dumps(Runs()))


def sparse(evil: Path) -> None:
    """Write a sound header for 8 GB of zeros, which the disk does not hold."""
    size = 8 * 10**9
    text = json.dumps({"a.lora_A.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    (evil / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(evil / TENSORS, 8 + len(text) + size)


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
LAYER = "base_model.model.model.layers.0"
WEIGHTS: dict[str, Callable[[Path, Ground], Attack]] = {
    "not a number": asked(first(lambda t: t.fill_(float("nan"))), says="expected finite numbers"),
    "infinite": asked(first(lambda t: t.fill_(float("-inf"))), says="expected finite numbers"),
    "far too large": asked(weights(lambda ts: [t.fill_(1e30) for t in ts.values()] and None), says="usual size"),
    "integers": asked(first(lambda t: t.to(torch.int8)), says="expected one of F32"),
    "double": asked(first(lambda t: t.double()), says="expected one of F32"),
    "float8": asked(first(lambda t: t.to(torch.float8_e4m3fn)), says="expected one of F32"),
    "turned": asked(first(lambda t: t.T), says="does not fit"),
    "of no size": asked(first(lambda t: t[:0]), says="does not fit"),
    "a scalar": asked(first(lambda t: t[0, 0]), says="does not fit"),
    "one missing": asked(weights(lambda ts: ts.pop(min(ts)) is None or None), says="only the model has"),
    "none": asked(weights(lambda ts: ts.clear()), says="adapter"),
    "another layer": asked(
        weights(lambda ts: ts.update({f"{LAYER}9.lora_A.weight": torch.ones(4, 4)})), says="only the"
    ),
    "a norm of the base": asked(
        weights(lambda ts: ts.update({f"{LAYER}.input_layernorm.weight": torch.zeros(256)})),
        says="only the adapter has",
    ),
    "an embedding of the base": asked(
        weights(lambda ts: ts.update({"base_model.model.model.embed_tokens.weight": torch.zeros(4096, 256)})),
        says="only the adapter has",
    ),
    "a name that climbs": asked(
        weights(lambda ts: ts.update({"../../x.lora_A.weight": torch.ones(4, 4)})), says="only the"
    ),
    "cut": asked(lambda evil: os.truncate(evil / TENSORS, 1000), says="does not fit"),
    "empty": asked(lambda evil: os.truncate(evil / TENSORS, 0), says="does not fit"),
    "a header without end": asked(header(b"{}", 2**63), says="does not fit"),
    "a header of a gigabyte": asked(header(b"{}", 2**30), says="does not fit"),
    "a header of brackets": asked(header(b"[" * 100_000), says="does not fit"),
    "overlapping": asked(header({"a": TENSOR, "b": TENSOR}, body=bytes(4)), says="does not fit"),
    "beyond its end": asked(header({"a": TENSOR | {"data_offsets": [0, 2**40]}}, body=bytes(4)), says="does not fit"),
    "a shape that overflows": asked(
        header({"a": TENSOR | {"shape": [2**62, 2**62]}}, body=bytes(4)), says="does not fit"
    ),
    "eight gigabytes of zeros": asked(sparse, says="expected at most"),
    "a pipe for weights": asked(replaced(TENSORS, os.mkfifo), says="no adapter_model.safetensors"),
    "a folder for weights": asked(replaced(TENSORS, Path.mkdir), says="no adapter_model.safetensors"),
    "a link to zeros for weights": asked(replaced(TENSORS, link("/dev/zero")), says="no adapter_model.safetensors"),
    "a link to a file of the user for weights": asked(replaced(TENSORS, link("/etc/passwd")), says="does not fit"),
    "pickled": asked(lambda evil: (pickled(evil), (evil / TENSORS).unlink()), says="no adapter_model.safetensors"),
    "pickled, evaluated": evaluated(
        lambda evil: (pickled(evil), (evil / TENSORS).unlink()), "--dataset", TEXT, says="no adapter_model.safetensors"
    ),
    "pickled beside": asked(pickled, codes=(0,)),
    "a tokenizer with code": asked(
        lambda evil: [shutil.copy(path, evil) for path in coded(evil / "base").iterdir() if "model" not in path.name],
        codes=(0,),
    ),
    "Python beside": asked(
        lambda evil: [
            (evil / f"{name}.py").write_text(CODE) for name in ("peft", "torch", "sitecustomize", "conftest")
        ],
        codes=(0,),
    ),
}

ATTACKS = SETTINGS | CONFIGS | WEIGHTS
assert len(ATTACKS) == len(SETTINGS) + len(CONFIGS) + len(WEIGHTS)
