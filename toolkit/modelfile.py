"""A Modelfile beside a merged model, for Ollama: its chat template, where answers end, and how tokens are chosen.

Ollama renders chats with Go's text/template, so the model's own template, which is written for Jinja, has to be said
anew. That is done where a template writes each message alone, between fixed texts; the result is compared with the
model's template on chats that tell most others apart, and is left out, with the reason, where one differs.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from config import ConfigError, GenerationConfig
from toolkit.chat_templates import Messages, render_chats

NAME = "Modelfile"
MARKS = ("\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3")  # noncharacters: no template contains them
MOST_LITERALS = 200


class NotEqual(ValueError):
    """A chat template cannot be said in Go's. The message says why, in one line."""


# ------------------------------------------------------------------------------------------------ the template


@dataclasses.dataclass(frozen=True)
class TurnForm:
    """A chat template as fixed texts around each message."""

    head: str  # what a chat without a system message begins with, such as a default system prompt
    around: dict[str, tuple[str, str]]  # by role, what stands before and after a message
    answer: str  # what the assistant's answer is written after

    def text(self, messages: Messages) -> str:
        """Return a chat up to where the answer begins, as `go` writes it."""
        parts = [] if messages[0]["role"] == "system" else [self.head]
        for message in messages:
            before, after = self.around[message["role"]]
            parts += [before, message["content"], after]
        return "".join([*parts, self.answer])

    def go(self) -> str:
        """Return the template for Go's text/template, with the fields that Ollama gives it.

        An answer that the assistant has begun, as the last message, is continued.
        """
        system, user, answered = (self.around[role] for role in ("system", "user", "assistant"))
        own = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_go(self.head)}{{{{ end }}}}' if self.head else ""
        return (
            own + "{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            f'{{{{ if eq $m.Role "system" }}}}{_go(system[0])}{{{{ $m.Content }}}}{_go(system[1])}'
            f'{{{{ else if eq $m.Role "user" }}}}{_go(user[0])}{{{{ $m.Content }}}}{_go(user[1])}'
            f'{{{{ else if eq $m.Role "assistant" }}}}{_go(answered[0])}{{{{ $m.Content }}}}'
            f"{{{{ if not $last }}}}{_go(answered[1])}{{{{ end }}}}{{{{ end }}}}"
            f'{{{{ if and $last (ne $m.Role "assistant") }}}}{_go(self.answer)}{{{{ end }}}}{{{{ end }}}}'
        )


def _go(text: str) -> str:
    """Return an action of Go's text/template that writes a fixed text."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _chat(*contents: str, first: str = "user") -> Messages:
    """Return a chat of these contents, of user and assistant in turn, perhaps after a system message."""
    roles = ["system", "user", "assistant"] if first == "system" else ["user", "assistant"]
    turns = roles + ["user", "assistant"] * len(contents)
    return [{"role": role, "content": text} for role, text in zip(turns, contents, strict=False)]


class Rendering:
    """A tokenizer's chat template with its options, as a function; a token that readers add themselves is left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]):
        self.tokenizer, self.options, self.begins = tokenizer, options, ""
        bos = str(tokenizer.bos_token or "")
        ids = tokenizer("a")["input_ids"]
        adds = bool(bos) and ids[:1] == [tokenizer.bos_token_id]
        starts = bool(bos) and self(_chat("a")).startswith(bos)
        if adds and not starts:
            raise NotEqual(f"the tokenizer puts {bos} before a text, and the chat template does not write it")
        self.begins = bos if adds else ""

    def __call__(self, messages: Messages, answer: bool = True) -> str:
        """Return a chat, with what comes before an answer if `answer`. Raise ConfigError if the template refuses it."""
        [text] = render_chats(self.tokenizer, [messages], add_generation_prompt=answer, **self.options)
        return text.removeprefix(self.begins)


def _between(text: str, before: str, mark: str, whole: str) -> tuple[str, str]:
    """Return what stands before and after a mark in a text, after the text `before`; raise NotEqual."""
    if not text.startswith(before) or text.count(mark) != 1:
        raise NotEqual(f"it does not write {whole} once, after the messages before it")
    return tuple(text[len(before) :].split(mark))  # type: ignore[return-value]


def turn_form(render: Rendering) -> TurnForm:
    """Return a chat template as fixed texts around each message; raise NotEqual or ConfigError if it is none."""
    a, b, c, d = MARKS
    asked, answered, again = (render(_chat(*contents), answer=False) for contents in ((a,), (a, b), (a, b, c)))
    assistant = _between(answered, asked, b, "the assistant's message")
    user = _between(again, answered, c, "the user's message")
    if not asked.endswith(user[0] + a + user[1]):
        raise NotEqual("it writes the first message of a chat in another way than a later one")
    head = asked.removesuffix(user[0] + a + user[1])
    with_system = render(_chat(d, a, first="system"), answer=False)
    if not with_system.endswith(user[0] + a + user[1]):
        raise NotEqual("it does not write a system message before the user's")
    system = _between(with_system.removesuffix(user[0] + a + user[1]), "", d, "a system message")
    prompted = render(_chat(a))
    if not prompted.startswith(asked):
        raise NotEqual("it writes the last message in another way than a message before it")
    return TurnForm(head, {"system": system, "user": user, "assistant": assistant}, prompted.removeprefix(asked))


def trial_chats(template: str) -> Iterator[Messages]:
    """Yield chats that tell a template which only puts texts around messages from one that reads or changes them.

    Among their contents is every literal of the template, such as a word that it looks for in an answer.
    """
    found = re.findall(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", template)
    literals = list(dict.fromkeys(one or two for one, two in found if one or two))[:MOST_LITERALS]
    literals += [text.replace("\\n", "\n") for text in literals if "\\n" in text]
    odd = [
        "",
        " ",
        "  two \n\n spaces \t\n",
        "<b>&amp; 'q' \"q\" \\n {{ x }} {% y %} `",
        "漢字 🙂",
        "<think>\na\n</think>\n\nb",
        *literals,
    ]
    for text in odd:
        yield _chat(text)
        yield _chat("a", text, "b")
        yield _chat("a", text, "b", text, text)
        yield _chat(text, "a", first="system")
        yield _chat(text, "a", text, text, first="system")
    yield _chat("\n".join(odd), "\n".join(odd), "\n".join(odd), first="system")
    yield _chat(*map(str, range(41)))


def go_template(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    """Return the tokenizer's chat template for Ollama; raise NotEqual if it cannot be said there.

    options: those of the chat template. A model without one gets its prompt as it is.
    """
    if tokenizer.chat_template is None:
        return "{{ .Prompt }}"
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        raise NotEqual("it writes the date")
    try:
        render = Rendering(tokenizer, options)
        form = turn_form(render)
        for messages in trial_chats(template):
            if render(messages) != form.text(messages):
                last = messages[-1]["content"]
                raise NotEqual(
                    f"it reads or changes what a message says, such as {json.dumps(last[:40], ensure_ascii=False)}"
                )
    except ConfigError as error:  # it refuses a chat that Ollama would send
        raise NotEqual(" ".join(error.problems)[:300]) from None
    if '"""' in form.go():
        raise NotEqual('it writes """, which ends a text in a Modelfile')
    return form.go()


# ------------------------------------------------------------------------------------------------ the file


def parameters(settings: GenerationConfig) -> dict[str, Any]:
    """Return Ollama's parameters that choose tokens as these settings do; what is off is off there too."""
    found = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k or 0,  # 0 is off; without it Ollama takes 40
        "min_p": 0,
        "repeat_penalty": settings.repetition_penalty,  # without it Ollama takes 1.1
        "num_predict": settings.max_new_tokens,
    }
    # Ours counts all tokens before, prompt included; Ollama's the last 64 unless it is told to count the whole context.
    return found | ({"repeat_last_n": -1} if settings.repetition_penalty != 1 else {})


def modelfile(
    tokenizer: PreTrainedTokenizerBase, ends: list[int], settings: GenerationConfig, options: dict[str, Any]
) -> tuple[str, list[str]]:
    """Return the text of a Modelfile, and a line about each thing that it cannot hold.

    ends: the tokens that end an answer; options: those of the chat template.
    """
    lines, missing = [f"# {COMMANDS}", "FROM ./model.gguf", ""], []
    try:
        lines += [f'TEMPLATE """{go_template(tokenizer, options)}"""']
    except NotEqual as error:
        missing.append(
            f"the chat template cannot be said in a {NAME} ({error}); llama-server --jinja reads the model's own"
        )
    if (prompt := settings.system_prompt) is not None:
        if '"""' in prompt or prompt.endswith('"'):
            missing.append(f'generation.system_prompt ends with " or has """, which no {NAME} can hold')
        else:
            lines.append(f'SYSTEM """{prompt}"""')
    for end in dict.fromkeys(ends):
        # As it appears in an answer: in the vocabulary of byte-level tokenizers a line break is Ċ and a space Ġ. A model
        # may name an end token that its tokenizer lacks, which has no text.
        if (token := tokenizer.decode([end])) and '"' not in token and token.isprintable() and "\ufffd" not in token:
            lines.append(f'PARAMETER stop "{token}"')
        else:
            missing.append(f"the end token {end}, {token!r}, cannot be said in a {NAME}")
    lines += [f"PARAMETER {name} {value}" for name, value in parameters(settings).items()]
    if settings.num_beams > 1:
        missing.append(f"generation.num_beams {settings.num_beams}: Ollama has no beam search")
    return "\n".join(
        [*lines[:2], *(f"# not in here: {' '.join(line.split())}" for line in missing), *lines[2:]]
    ) + "\n", [f"{NAME}: {line}" for line in missing]


COMMANDS = "model.gguf: python convert_hf_to_gguf.py . --outtype f16 --outfile model.gguf (llama.cpp's converter)"


def next_commands(folder: Path) -> list[str]:
    """Return lines with the commands that run a merged model in other engines, ready to copy."""
    there, gguf = shlex.quote(str(folder)), shlex.quote(str(folder / "model.gguf"))
    name = re.sub(r"[^a-z0-9._-]+", "-", folder.resolve().name.lower()).strip("-._") or "model"
    return [
        "run it elsewhere (docs/deploy.md):",
        f"  transformers serve {there}",
        f"  python convert_hf_to_gguf.py {there} --outtype f16 --outfile {gguf}; llama-server -m {gguf} --jinja",
        f"  ollama create {name} -f {shlex.quote(str(folder / NAME))}; ollama run {name}",
        f"  vllm serve {there}",
    ]
