"""Settings made at random: each is either a sound Config, or refused in short lines that name what is wrong.

500 examples; 2,000 with QLORA_FUZZ=2000, before a change of the loader lands.
"""

import json
import math
import os
import re
import time

import pytest

from config import (
    LEAVES,
    SECTIONS,
    SHORT,
    Config,
    ConfigError,
    flatten,
    load_config,
    save_config,
)
from toolkit.flags import build_parser, parse_arguments

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402  (after the line that skips)
from hypothesis import strategies as st  # noqa: E402

SECONDS = 2
ODD = [  # what YAML, Python's numbers, paths and terminals treat in a way of their own
    *(
        "!!bool 1",
        '!!int ""',
        "!!float ''",
        "!!timestamp soon",
        "!!binary x",
        "!!set {a, b}",
        "!!python/name:os.system ",
        "! x",
    ),
    *("1:30", "190:20:30.15", "0x1F", "010", "0b1", "1_000", "1e5", "2e-4", "+1", "-0", ".5", "5.", "1__0.", "٣", "１"),
    *(
        ".inf",
        "-.INF",
        ".nan",
        "nan",
        "inf",
        "1e308",
        "1e309",
        "-1e308",
        "1e-320",
        "0.9999999999999999",
        "1" + "0" * 400,
    ),
    *(
        "9" * 4400,
        str(2**63),
        str(2**64),
        str(-(2**64)),
        "1e38",
        "2001-99-99",
        "2001-01-01 01:01:01",
        "=",
        "<<",
        "~",
        "null",
    ),
    *(
        "yes",
        "No",
        "on",
        "OFF",
        "true",
        "y",
        "[]",
        "{}",
        "[[]]",
        "[q_proj]",
        "[q_proj, 5]",
        "[null]",
        "['']",
        "{a: b}",
        "?",
    ),
    *(
        "*a",
        "&a x",
        "&a [*a]",
        "&a {<<: *a}",
        "<<: [*a]",
        "'",
        '"',
        '"\\0"',
        '"\\e[2J"',
        '"\\ud800"',
        '"a\\nb"',
        "|\n  a\n  b",
    ),
    *(
        "%YAML 1.1",
        "---",
        "...",
        "# a",
        "\t",
        "\ufeff",
        "\u202ea",
        "../..",
        "~/x",
        "~nobody/x",
        "/dev/null",
        "x" * 5000,
        "- a",
    ),
    *(
        "all-linear",
        "all_linear",
        "auto",
        "none",
        "offload",
        "a b",
        "a, b",
        "a: b: c",
        "[" * 300,
        "{a: " * 300,
        "\x85",
        "é",
    ),
]
KEYS = st.one_of(
    st.sampled_from([leaf.key for leaf in LEAVES.values()]),
    st.sampled_from(
        [*SECTIONS, *SHORT, "<<", "lr", "5", "null", "true", '"\\e[2J"', "? [a]", "x" * 2000, "a b", "''", "*a"]
    ),
)
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.integers().map(str),
    st.integers(-3, 70_000).map(str),
    st.floats().map(repr),
    st.text(max_size=20),
    st.text(st.characters(max_codepoint=160), max_size=12).map(json.dumps),
    st.lists(st.sampled_from(ODD[:70]), max_size=4).map(lambda items: f"[{', '.join(items)}]"),
    st.sampled_from([str(leaf.field.default) for leaf in LEAVES.values()]),
)
LEAF_LINES = st.sampled_from(list(LEAVES.values())).flatmap(
    lambda leaf: VALUES.map(lambda value: f"{leaf.section}: {{{leaf.key}: {value}}}\n")
)
SECTION_LINES = st.tuples(KEYS, st.lists(st.tuples(KEYS, VALUES), max_size=4)).map(
    lambda item: f"{item[0]}:\n" + "".join(f"  {key}: {value}\n" for key, value in item[1])
)
FILES = st.one_of(
    LEAF_LINES,
    st.lists(st.one_of(LEAF_LINES, SECTION_LINES, VALUES.map(lambda value: f"{value}\n")), max_size=6).map("".join),
    st.text(max_size=60),
).map(lambda text: text.encode("utf-8", "surrogatepass"))
CONTENTS = st.one_of(FILES, FILES, FILES, st.binary(max_size=60))
FLAGS = st.lists(
    st.tuples(st.sampled_from([*LEAVES, *SHORT]), st.one_of(VALUES, VALUES, st.text(max_size=8))).map(
        lambda item: f"--{item[0]}={item[1]}"
    ),
    max_size=3,
)
STRAY = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from(["--", "--rnak", "-r", "--config", "--lr=1"])), max_size=1
)


def read(path, flags: list[str]) -> Config:
    """Return the configuration of a file and flags, as a script reads it."""
    return load_config(path, parse_arguments(build_parser("fuzz"), ["--config", str(path), *flags])[1])


def is_named(item: object) -> bool:
    """Return whether an item of a list is a text, or a source of data that has one."""
    text = item.get("dataset") if isinstance(item, dict) else item
    return isinstance(text, str) and bool(text.strip())


def check_bounds(config: Config) -> None:
    """Check every value against the schema's declarations, with comparisons of this file's own."""
    for name, value in flatten(config).items():
        limits, kinds = LEAVES[name].field.metadata, LEAVES[name].kinds
        assert type(value) in kinds, name
        if isinstance(value, str):
            assert value in limits.get("choices", (value,)) and "\0" not in value, name
            value.encode("utf-8")
        if isinstance(value, tuple):
            plain = [type(item) is int and item >= 0 if LEAVES[name].items is int else is_named(item) for item in value]
            assert value and all(plain), name
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert math.isfinite(value), name
            assert limits.get("at_least", value) <= value <= limits.get("at_most", value), name
            assert limits.get("above", -math.inf) < value < limits.get("below", math.inf), name
            assert value == 0 or value >= limits.get("zero_or_at_least", value), name


@settings(
    max_examples=int(os.environ.get("QLORA_FUZZ", 500)),
    deadline=None,
    database=None,
    derandomize="QLORA_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(content=CONTENTS, flags=FLAGS, stray=STRAY)
def test_config_is_sound_or_refused_in_short_lines(tmp_path_factory, content, flags, stray):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "fuzzed.yaml"
    path.write_bytes(content)
    started = time.perf_counter()
    try:
        config = read(path, flags + stray)
    except ConfigError as error:
        assert error.problems
        for problem in error.problems:
            assert problem.strip() and "\n" not in problem and len(problem) < 700 + 2 * len(str(path)), problem
    else:
        check_bounds(config)
        saved = folder / "saved.yaml"
        save_config(config, saved)
        assert load_config(saved) == config
    assert time.perf_counter() - started < SECONDS


def test_a_fuzzed_value_reaches_every_setting():
    """A control: values of the list above are accepted by some settings and refused by others, of each section."""
    accepted, refused = set(), set()
    for name in LEAVES:
        for value in ODD:
            try:
                load_config((), {name: value})
                accepted.add(name)
            except ConfigError as error:
                source = r"(\[\d+\](\.\S+)?)?"  # of a list in data.dataset
                assert re.match(rf"{re.escape(name)}{source}: ", error.problems[0]), error.problems
                refused.add(name)
    assert accepted >= {name for name, leaf in LEAVES.items() if "choices" not in leaf.field.metadata}
    assert refused == set(LEAVES) - {"generation.system_prompt"}  # any of them may be said to a model
