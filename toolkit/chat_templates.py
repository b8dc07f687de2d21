"""Chat templates: where one comes from, and the only function that renders one.

    render_chats(tokenizer, chats) -> texts          adopt_template(tokenizer, adapter)

Rendering happens in a child process with a limit of time and of memory (template_child.py).
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import CHAT_TEMPLATE_FILE, cached_file

from config import ConfigError, ModelConfig
from quantization_utils import QUIETLY
from toolkit import template_child
from toolkit.earlier_run import left_by_run
from toolkit.template_files import check_template, read_template

Messages = list[dict[str, Any]]


TIME_IS_UP = f"it does not end within {template_child.SECONDS} s"


class Child:
    """The process that renders, started at its first use."""

    process: subprocess.Popen | None = None
    endless: str | None = None  # the template whose time was up, so that nobody waits for it again

    def start(self) -> subprocess.Popen:
        # -I: what lies in the user's current folder or in PYTHONPATH alone is not imported
        command = [sys.executable, "-I", template_child.__file__, *filter(None, sys.path)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, **pipes)

    def prepare(self) -> None:
        """Start the process, if it is not running, without waiting for its imports."""
        if self.process is None or self.process.poll() is not None:  # not started, or ended from outside
            self.process = self.start()

    def ask(
        self, chats: list[Messages], options: dict[str, Any], own: list[dict[str, Any]] | None = None
    ) -> list[dict[str, str]]:
        """Return an answer for each chat, as `template_child.answer` makes it, up to the first that ends the process.

        options: of all chats. own: those of each chat, which come before them.
        """
        requests = list(zip(chats, own or [{}] * len(chats), strict=True))
        if self.endless is not None and self.endless == options.get("chat_template"):
            return [{"fails": TIME_IS_UP}]
        self.prepare()
        started = time.monotonic()
        lines: list[bytes] = []
        try:
            self.process.stdin.write(json.dumps([requests, options]).encode() + b"\n")
            self.process.stdin.flush()
            while len(lines) < len(chats) and (line := self.process.stdout.readline()).endswith(b"\n"):
                lines.append(line)
        except OSError:  # it has ended
            pass
        finally:  # after Ctrl-C, too, its next answer would be one to this request
            code = self.stop() if len(lines) < len(chats) else None
        answers = [json.loads(line) for line in lines]
        if code is None:
            return answers
        if time.monotonic() - started >= template_child.SECONDS:
            self.endless = options.get("chat_template")
            return [*answers, {"fails": TIME_IS_UP}]
        return [*answers, {"fails": f"the process that renders it ended (exit code {code})"}]

    def stop(self) -> int | None:
        """End the process, and return its exit code; the next request starts another one."""
        process, self.process = self.process, None
        if process is None:
            return None
        process.stdout.close()
        try:
            process.stdin.close()
            return process.wait(1)
        except (OSError, subprocess.TimeoutExpired):
            process.kill()
            return process.wait()


CHILD = Child()


def prepare_child(model: ModelConfig) -> None:
    """Start the process that renders, unless the files of the model's tokenizer are here and have no chat template.

    It would be started at its first use; now its imports take place while the weights or the tokenizer are read.
    """
    names, settings = (CHAT_TEMPLATE_FILE, "tokenizer_config.json"), None
    with contextlib.suppress(OSError, ValueError):  # no name that the hub can have: loading the model says so
        jinja, settings = (
            cached_file(model.name, name, revision=model.revision, local_files_only=True, **QUIETLY) for name in names
        )
    if settings is None or jinja is not None or b'"chat_template"' in Path(settings).read_bytes():
        CHILD.prepare()


def visible(text: str) -> str:
    """Return a text of a stranger in one line, with control characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def adopt_template(tokenizer: PreTrainedTokenizerBase, adapter: Path | None) -> None:
    """Give a tokenizer without a chat template the one that the adapter was trained with, if any; raise ConfigError.

    adapter: its folder, or None. A tokenizer from the hub is checked here, since it is on the disk now.
    """
    check_template(tokenizer.chat_template, f"model.name: {tokenizer.name_or_path}")
    if adapter is not None and tokenizer.chat_template is None:
        own = adapter / CHAT_TEMPLATE_FILE
        for path in [own] if os.path.lexists(own) else left_by_run(adapter, CHAT_TEMPLATE_FILE):
            tokenizer.chat_template, tokenizer.chat_template_path = read_template(path), path


def template_file(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of the file that the tokenizer's chat template was read from, for messages."""
    if adopted := getattr(tokenizer, "chat_template_path", None):
        return str(adopted)
    name = tokenizer.name_or_path
    for file in (CHAT_TEMPLATE_FILE, "tokenizer_config.json"):
        if name and (path := cached_file(name, file, local_files_only=True, **QUIETLY)) is not None:
            return str(path)
    return f"the tokenizer of {name}"


def render_chats(
    tokenizer: PreTrainedTokenizerBase,
    chats: list[Messages],
    template: str | None = None,
    each: list[dict[str, Any]] | None = None,
    **options: Any,
) -> Iterator[str]:
    """Yield each chat as the tokenizer's template writes it, exactly as `apply_chat_template(tokenize=False)` does.

    template: instead of the tokenizer's own. options: add_generation_prompt and those of the template, for all chats;
    each: more of them for each chat, such as its tools. A chat that cannot be rendered raises a ConfigError, which names
    the template's file and what is wrong. Time and memory are limited (template_child.py).
    """
    own = [{"add_generation_prompt": False} | options | more for more in each or [{}] * len(chats)]
    for start in range(0, len(chats), template_child.MOST):
        part = slice(start, start + template_child.MOST)
        for answer in _answers(tokenizer, chats[part], template, own[part]):
            if "text" not in answer:
                ((verb, reason),) = answer.items()
                what = "refuses these messages" if verb == "refuses" else "fails"
                raise ConfigError(f"{template_file(tokenizer)}: the chat template {what}: {visible(reason)[:400]}")
            yield answer["text"]


def _answers(
    tokenizer: PreTrainedTokenizerBase, chats: list[Messages], template: str | None, own: list[dict[str, Any]]
) -> list[dict[str, str]]:
    """Return for each chat its text, or why there is none, up to the first that ends the process."""
    try:
        if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            # A class with a method of its own comes with trust_remote_code: the user trusts that code.
            pairs = zip(chats, own, strict=True)
            return [{"text": tokenizer.apply_chat_template(chat, tokenize=False, **more)} for chat, more in pairs]
        chosen = tokenizer.get_chat_template(template)
        own = [dict(more) for more in own]
        for more in (more for more in own if more.get("tools")):  # a tokenizer may have a template of its own for tools
            with_tools = tokenizer.get_chat_template(template, more["tools"])
            more |= {"chat_template": with_tools} if with_tools != chosen else {}
        return CHILD.ask(chats, tokenizer.special_tokens_map | {"chat_template": chosen}, own)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, TemplateError) as error:
        return [{"fails": template_child.described(error)}]


CHANGES = "leaves out or changes what the user or the system prompt says"


def changes_words(messages: Messages, text: str) -> bool:
    """Return whether a rendered chat lacks the words of a user's or system's message, apart from spaces around them."""
    return any(m["role"] in ("user", "system") and m["content"].strip() not in text for m in messages)
