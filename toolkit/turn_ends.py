"""The tokens that end an answer: what the chat template writes, what a run has learned, and where generation stops.

A run leaves them as generation_config.json beside its adapter, a merge beside the model.
"""

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CHAT_TEMPLATE_FILE

import quantization_utils
from config import Config, ConfigError
from fast_path.loss import IGNORED
from toolkit.chat_templates import prepare_child, render_chats
from toolkit.earlier_run import GENERATION, left_by_run, read_ends
from toolkit.template_files import read_template

if TYPE_CHECKING:  # it imports datasets, which inference does not need
    from toolkit.data_blocks import Blocks

MARK = "\ufdd0"  # a noncharacter: no template contains it
# Put before a template that writes no end: every answer that it gets ends with the end of sequence token. {which}: a
# condition on the turn. The line break after the last block is the one that transformers removes.
WITH_END = (
    "{{%- set ended = namespace(messages=[]) -%}}{{%- for message in messages -%}}"
    "{{%- if message.role == 'assistant' and message.content is string{which} -%}}"
    "{{%- set ended.messages = ended.messages + [dict(message, content=message.content + eos_token)] -%}}"
    "{{%- else -%}}{{%- set ended.messages = ended.messages + [message] -%}}{{%- endif -%}}"
    "{{%- endfor -%}}{{%- set messages = ended.messages %}}\n"
)

# ------------------------------------------------------------------------------------------------ the template


def ends_of_template(tokenizer: PreTrainedTokenizerBase) -> list[int | None]:
    """Return the token that the chat template writes after an answer within a chat, and after a last one; None: none.

    The list is empty without a template, and if the template refuses a simple chat with and without a system message.
    """
    if tokenizer.chat_template is None:
        return []
    turns = [("user", "a"), ("assistant", f"b{MARK}"), ("user", "c"), ("assistant", f"d{MARK}")]
    chat = [{"role": role, "content": text} for role, text in turns]
    for messages in (chat, [{"role": "system", "content": "s"}, *chat]):
        try:
            [text] = render_chats(tokenizer, [messages])
        except ConfigError:
            continue
        added = sorted(((str(t), i) for i, t in tokenizer.added_tokens_decoder.items()), key=lambda t: -len(t[0]))
        tails = [tail.lstrip() for tail in text.split(MARK)[1:]]
        return [next((i for token, i in added if tail.startswith(token)), None) for tail in tails]
    return []


def with_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template with the model's end of sequence token after each answer, or None if it has an end.

    If only the last answer of a chat lacks one, only that answer gets it.
    """
    ends = ends_of_template(tokenizer)
    code = (
        type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    )  # instead of a template
    if not ends or ends[-1] is not None or tokenizer.eos_token is None or code:
        return None
    which = " and loop.last" if ends[0] is not None else ""
    return WITH_END.format(which=which) + tokenizer.get_chat_template()


def teach_ends(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Have the chat template end each answer, if it does not; return a list with a line about that, or []."""
    if (template := with_end(tokenizer)) is None:
        return []
    tokenizer.chat_template, tokenizer.template_with_end = template, template
    return [
        f"the chat template writes no end token after an answer: each answer ends with {tokenizer.eos_token}, the "
        "model's own"
    ]


def load_tokenizer(config: Config, say: Callable[[str], None] = lambda line: None) -> PreTrainedTokenizerBase:
    """Return the base's tokenizer, whose chat template ends each answer."""
    prepare_child(config.model)  # it imports what it needs while the tokenizer is read
    model = config.model
    tokenizer = quantization_utils.load_tokenizer(model.name, model.revision, model.trust_remote_code)
    for line in teach_ends(tokenizer):
        say(line)
    return tokenizer


def adopt_end(tokenizer: PreTrainedTokenizerBase, adapter: Path | None) -> None:
    """Have the chat template end each answer if the adapter was trained so: its folder holds exactly that template."""
    for path in left_by_run(adapter, CHAT_TEMPLATE_FILE) if adapter else ():
        template = with_end(tokenizer)
        if template is not None and read_template(path).splitlines() == template.splitlines():
            tokenizer.chat_template = template


# ------------------------------------------------------------------------------------------------ what was learned


def learned_ends(blocks: "Blocks", tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the added tokens with which the learned parts of samples end; none for text, whose end is always one."""
    samples = [part.origin.select_columns("labels") for part in blocks.parts if "labels" in part.origin.column_names]
    found: set[int] = set()
    for table in itertools.chain.from_iterable(part.with_format("arrow").iter(10_000) for part in samples):
        rows = table["labels"].combine_chunks()
        labels, stops = rows.flatten().to_numpy(), np.cumsum(rows.value_lengths().to_numpy().astype(np.int64))
        last = labels != IGNORED
        last[:-1] &= labels[1:] == IGNORED
        stops = stops[stops > 0]
        last[stops - 1] = labels[stops - 1] != IGNORED  # the next label belongs to another row
        found |= set(np.unique(labels[last]).tolist())
    return found & set(tokenizer.added_tokens_decoder)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, learned: Iterable[int] = ()) -> list[int]:
    """Return every token that ends an answer: of the model's files, the tokenizer, the chat template, and `learned`.

    A run on text teaches <|endoftext|> after a document, if the vocabulary has it.
    """
    named = [model.generation_config.eos_token_id, getattr(model.config, "eos_token_id", None), tokenizer.eos_token_id]
    named += [tokenizer.get_vocab().get("<|endoftext|>"), *ends_of_template(tokenizer), *learned]
    return sorted({i for ids in named for i in (ids if isinstance(ids, list) else [ids]) if i is not None})


def adapter_ends(adapter: Path | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the end tokens that an adapter's folder names, if any; raise ConfigError if the tokenizer lacks one."""
    path, ends = read_ends(adapter) if adapter else (None, [])
    if unknown := sorted(set(ends) - set(tokenizer.get_vocab().values())):
        raise ConfigError(f"--adapter: {path}: eos_token_id: expected ids of the tokenizer, got {unknown[0]}")
    return ends


def left_beside(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, blocks: "Blocks") -> dict[str, str]:
    """Return what a run leaves beside its adapter, {file: text}: its end tokens, and its chat template if it is new."""
    ends = end_tokens(model, tokenizer, learned_ends(blocks, tokenizer))
    template = blocks.template or getattr(tokenizer, "template_with_end", None)
    files = {GENERATION: json.dumps({"eos_token_id": ends}, indent=2) + "\n"}
    return files | ({CHAT_TEMPLATE_FILE: template} if template else {})
