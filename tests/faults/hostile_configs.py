"""Settings that a stranger could send: config.yaml and flags."""

import os
from collections.abc import Callable
from pathlib import Path

from tests.faults.adversary import CODE, Attack, Ground, train

Build = Callable[[Path, Ground], Attack]


def config(text: str | bytes, says: str = "hostile.yaml") -> Build:
    """Return a function that writes a config.yaml and trains with it."""

    def build(folder: Path, ground: Ground) -> Attack:
        content = text if isinstance(text, bytes) else text.encode("utf-8")
        (folder / "hostile.yaml").write_bytes(content)
        return train("--config", folder / "hostile.yaml", says=says)

    return build


def flag(name: str, text: str) -> Build:
    """Return a function that gives a flag a value."""
    return lambda folder, ground: train(f"--{name}", text, says=rf"\.{name}: expected ")


def pipe(folder: Path, ground: Ground) -> Attack:
    os.mkfifo(folder / "hostile.yaml")
    return train("--config", folder / "hostile.yaml", says="got a named pipe")


def endless(folder: Path, ground: Ground) -> Attack:
    return train("--config", "/dev/zero", says="expected at most 1,048,576 bytes")


def linked(folder: Path, ground: Ground) -> Attack:
    (folder / "hostile.yaml").symlink_to("hostile.yaml")
    return train("--config", folder / "hostile.yaml", says="hostile.yaml")


def code_of_the_model(folder: Path, ground: Ground) -> Attack:
    """The user asked for a model of others, and no more: its code needs the user's own word."""
    ground.copy("model", folder / "model")
    text = (folder / "model" / "config.json").read_text()
    (folder / "model" / "config.json").write_text(
        text.replace("{", '{"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},', 1)
    )
    (folder / "model" / "own.py").write_text(CODE)
    return train("--model_name", folder / "model", codes=(0, 1, 2))


# Each level is nine times as long as the one before: of twelve levels a repr would need all memory there is.
LEVELS = "".join(f"  k{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 13))
BOMB = f"model: {{name: &b0 [{', '.join('x' * 9)}]}}\ntraining:\n{LEVELS}"
WIDE = f"model: [&a [{'x, ' * 49_000}x], &b [{'*a, ' * 6}x], &c [{'*b, ' * 6}x], *c, *c]\n"

ATTACKS: dict[str, Build] = {
    "python object": config(f'model: !!python/object/apply:builtins.exec ["{CODE}"]\n'),
    "python name": config("model: {name: !!python/name:os.system }\n"),
    "python module as a key": config("? !!python/module:antigravity\n: 5\n"),
    "tag on a value": config("training: {seed: !!bool 1}\n"),
    "tag that needs a value": config('training: {seed: !!int ""}\n'),
    "tag of a date": config("training:\n  seed: !!timestamp soon\n"),
    "tag as a flag": flag("seed", "!!bool 1"),
    "own tag directive": config("%TAG ! tag:yaml.org,2002:python/\n---\nmodel: !object/apply:os.abort []\n"),
    "bomb in a known key": config(f"{BOMB}  seed: *b12\n"),
    "bomb in a list of names": config(f"{BOMB}lora: {{target_modules: *b12}}\n"),
    "bomb as a section": config(f"{BOMB}data: *b12\n"),
    "bomb of few aliases": config(WIDE, says="model: expected keys and values"),
    "deep value": config(f"lora: {{rank: {'[x, ' * 100}x{']' * 100}}}\n", says="rank: expected an integer"),
    "alias of itself": config("training: &t {seed: [*t]}\n", says="(seed: expected|hostile.yaml)"),
    "merge of itself": config("training: &t {<<: *t, seed: x}\n", says="seed: expected"),
    "deep brackets": config("[" * 100_000),
    "deep mappings": config("a: " * 5 + "{" * 20_000),
    "deep indents": config("".join(" " * i + "a:\n" for i in range(1400))),
    "huge file": config("# " + "x" * 5_000_000, says="expected at most"),
    "half a million options": config(
        f"data: {{template_options: {{{', '.join(f'a{i}' for i in range(90_000))}}}}}\n", says="at most 50,000 values"
    ),
    "thousands of options": config(
        f"data: {{template_options: {{{', '.join(f'a{i}: 1' for i in range(9_000))}}}}}\n",
        says=r"template_options: expected at most 100 names and values",
    ),
    "one huge option": config(
        f"data: {{template_options: {{a: {'x' * 500_000}}}}}\n", says=r"template_options: expected at most 100 names"
    ),
    "one huge key": config(f"? {'k' * 500_000}\n: 5\n", says="unknown section"),
    "one huge text": config(
        f"training: {{optim: {'k' * 500_000}}}\n", says=r"training\.optim: expected .*500,002 characters"
    ),
    "digits without end": config(f"training: {{seed: {'9' * 100_000}}}\n"),
    "rank of a thousand million": flag("rank", "1000000000"),
    "epochs that overflow": flag("num_epochs", "1e308"),
    "steps that overflow": flag("max_steps", "1" + "0" * 400),
    "length that overflows": flag("max_length", "1" + "0" * 30),
    "dropout of nearly one": flag("dropout", "0.9999999999999999"),
    "rate that overflows": flag("learning_rate", "1e308"),
    "alpha that float32 lacks": flag("alpha", "1e-320"),
    "zero byte in a path": config('training: {output_dir: "a\\0b"}\n', says=r"output_dir: expected .*x00b"),
    "escape in a path": config('training: {output_dir: "\\e[2J"}\n', says=r"output_dir: expected .*x1b"),
    "escape in a section": config('"\\e]0;owned\\a": 5\n', says=r"x1b\]0;owned.x07.: unknown section"),
    "escape in a key": config('lora: {"\\e[2Jrank": 5}\n', says=r"lora\.'\\x1b\[2Jrank': unknown key"),
    "line break in a key": config('"lora\\nerror: all is well": 5\n', says=r"'lora\\nerror: all is well': unknown"),
    "reversed words": config('"\\u202egnp.eciov": 5\n', says=r"\\u202egnp"),
    "another encoding": config("lora: {rank: 8}".encode("utf-16"), says="looks like UTF-16"),
    "binary": config(bytes(range(256)) * 100),
    "named pipe": pipe,
    "device without an end": endless,
    "link to itself": linked,
    "model with code": code_of_the_model,
}
