"""Plain values: text, numbers, true, false, null, lists and mappings, as YAML has them, with limits.

It imports nothing of the project: config.py imports it.
"""

import math
import re
import reprlib
from typing import Any

import yaml


def brief(value: Any) -> str:
    """Return a value's repr, cut to 200 characters.

    Of a list or a mapping only the first items are expanded: with aliases a small file can hold one that fills the
    memory when it is printed.
    """
    if isinstance(value, (list, tuple, dict)):
        short = reprlib.Repr()
        short.maxlevel, short.maxlist, short.maxdict, short.maxstring, short.maxother = 3, 12, 12, 80, 80
        return short.repr(value)[:200]
    # Python refuses to print an integer of more than 4,300 digits in decimal.
    text = hex(value) if isinstance(value, int) and abs(value) >= 2**64 else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text):,} characters)"


MOST_OPTIONS, MOST_CHARACTERS = 100, 100_000  # of a mapping, and of all its values

# What a chat template is given anyway, and what would replace the template.
RESERVED = frozenset(
    [
        "messages",
        "conversation",
        "conversations",
        "chat_template",
        "self",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "return_assistant_tokens_mask",
        "tokenize",
        "tokenizer",
    ]
)


def is_option(name: Any, value: Any) -> bool:
    """Return whether this may be an option of a chat template: a name of its own with a plain value."""
    if not isinstance(name, str) or not name.isidentifier() or name in RESERVED or name.endswith("_token"):
        return False
    plain = value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
    return plain or (isinstance(value, str) and is_text(value, long=True))


def is_text(value: str, long: bool = False) -> bool:
    """Return whether a str may be the value of a text setting: not blank, and without control characters.

    No path and no name has control characters, and UTF-8 cannot store half of a surrogate pair. long: a text that may
    be empty and have several lines.
    """
    refused = "[\0\ud800-\udfff]" if long else "[\0-\x1f\x7f-\x9f\ud800-\udfff]"
    return bool(long or value.strip()) and re.search(refused, value) is None


class PlainLoader(yaml.SafeLoader):
    """A SafeLoader of plain values: text, numbers, true, false, null, lists and mappings.

    It refuses tags such as `!!bool`, which force a type on any text, many aliases, with which a small file becomes a
    huge value, and a key that is written twice: YAML forbids it, PyYAML silently keeps the last.
    """

    aliases = nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, problem = self.peek_event(), ""
        self.nodes += 1
        if isinstance(event, yaml.AliasEvent):
            self.aliases += 1
            problem = f"expected at most {MOST_ALIASES} aliases (*name)" if self.aliases > MOST_ALIASES else ""
        elif self.nodes > MOST_NODES:
            problem = f"expected at most {MOST_NODES:,} values"
        elif event.tag is not None:
            problem = f"expected a plain value, got the tag {brief(event.tag)}"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {brief(key.value)} is written twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


MOST_ALIASES, MOST_NODES = 20, 50_000
# Of YAML 1.1's notations these stay text: dates, 1:30 (90), 0x1f (31) and 010 (8).
PlainLoader.yaml_implicit_resolvers = {}
for _kind, _form, _first in (
    ("bool", "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", "[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+][0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", "<"),
):
    PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_form})\\Z"), list(_first))
