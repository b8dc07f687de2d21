"""Whether files hold chat templates that can be used at all. Imports no torch; chat_templates.py renders them."""

import json
import os
import re
from pathlib import Path
from typing import Any

from config import ConfigError
from toolkit.regular_files import not_regular

LONGEST = 1_000_000  # characters; the templates of known models have up to 30,000


def read_template(path: Path) -> str:
    """Return the chat template that a file holds; raise ConfigError if it holds none.

    A link may lead to another template or into the hub's cache. A template is copied into what a run leaves, which is
    made to be shared, so it must not be any other file of the user.
    """
    target = Path(os.path.realpath(path))
    if target.suffix != ".jinja" and target.parent.name != "blobs":
        raise ConfigError(f"{path}: expected a chat template, got a link to {target}")
    if not target.is_file():
        got = "a folder" if target.is_dir() else "a pipe or device" if target.exists() else "a broken link"
        raise ConfigError(f"{path}: expected a file with a chat template, got {got}")
    try:
        with open(target, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected a chat template in UTF-8: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the chat template: {error.strerror}") from None
    check_template(text, str(path))
    return text


def check_template(template: Any, where: str) -> None:
    """Raise ConfigError, which begins with `where`, if this is not a chat template in a form that transformers reads.

    Such are a text, a list of mappings with name and template, a mapping from names to texts, and None for no template.
    """
    pairs = list(template.items()) if isinstance(template, dict) else [("default", template)]
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        pairs = [(entry.get("name"), entry.get("template")) for entry in template]
    for name, text in pairs if template is not None else ():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w .-]*", name):  # they become names of files
            problem = f"expected a name of letters and digits, got {ascii(name)[:60]}"
        elif not isinstance(text, str) or not text.strip():
            problem = f"expected a text that is not empty, got {ascii(text)[:60]}"
        elif len(text) > LONGEST:
            problem = f"expected at most {LONGEST:,} characters, got more"
        else:
            continue
        raise ConfigError(f"{where}: chat_template: {problem}")


def check_template_files(model_name: str) -> None:
    """Raise ConfigError, which names the file, if a chat template in a model's folder cannot be used."""
    folder = Path(model_name)
    if not os.path.isdir(folder):  # on the hub: transformers reads the file, and then its template is checked
        return
    for path in (folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))):
        if os.path.lexists(path):
            read_template(path)
    for path in sorted(folder.iterdir()):  # what transformers opens, it reads to the end
        if path.exists() and not path.is_dir() and (problem := not_regular(path)):
            raise ConfigError(f"model.name: {folder}: expected files, got {path.name}, which is {problem}")
    settings = folder / "tokenizer_config.json"
    try:
        found = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError, RecursionError):  # absent or damaged: transformers says what is wrong
        return
    check_template(found, str(settings))
