"""Chats as people have them: what is read, what is learned, counted by a walk over the tokens of its own."""

import copy
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from config import ConfigError, DataConfig
from fast_path.loss import IGNORED
from quantization_utils import load_tokenizer
from toolkit.data_blocks import make_blocks
from toolkit.data_files import load_rows
from toolkit.data_formats import tokenize_rows

SHARED = Path(__file__).resolve().parents[3] / "shared"
TEMPLATE = SHARED / "offline" / "qwen2.5_chat_template.jinja"
CALL = {"type": "function", "function": {"name": "get_tide", "arguments": {"port": "Husum"}}}
WRITTEN_CALL = '<tool_call>\n{"name": "get_tide", "arguments": {"port": "Husum"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "get_tide", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def qwen(tiny_model):
    """Qwen2.5's tokenizer and template; the tiny tokenizer with that template where the real one is not at hand."""
    if folder := os.environ.get("QLORA_QWEN_TOKENIZER"):
        return load_tokenizer(folder)
    if not TEMPLATE.is_file():
        pytest.skip(f"no {TEMPLATE}")
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def with_template(tokenizer, template: str | None):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


# A template of our own words that, like Qwen3's, writes thoughts behind the last question only, and an empty one there.
THINKS = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}"
    "{%- endif -%}{%- endfor -%}{%- for m in messages -%}{%- set body = m.content -%}{%- set why = '' -%}"
    "{%- if m.reasoning_content is string -%}{%- set why = m.reasoning_content -%}{%- elif '</think>' in body -%}"
    "{%- set why = body.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set body = body.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last -%}{{ '<think>\n' + why + '\n</think>\n\n' }}{%- endif -%}"
    "{{ body + '<|im_end|>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}{%- endif -%}"
)


def settings(path: Path, **keys) -> DataConfig:
    return DataConfig(**{"dataset": str(path), "validation_fraction": 0.0, "max_length": 512, **keys})


def tokenised(source: Path | list[dict], tokenizer, tmp_path: Path, **keys):
    """Tokenise rows, or the first rows of a file."""
    path = source
    if isinstance(source, list):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in source), encoding="utf-8")
    data = settings(path, **keys)
    return tokenize_rows(load_rows(data), tokenizer, data)


def case(name: str) -> Path:
    path = SHARED / "cases" / name
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


def walk(tokenizer, ids: list[int], labels: list[int]) -> list[tuple[str, str, str]]:
    """Read a ChatML chat token by token: (role, text, what of it is learned) of each turn.

    Each token that begins or ends a turn is looked for by its id, and nothing is asked of the code under test.
    """
    begin, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>"))
    turns, place = [], 0
    while place < len(ids):
        if ids[place] != begin:  # the line break between two turns
            assert labels[place] == IGNORED and not tokenizer.decode([ids[place]]).strip()
            place += 1
            continue
        stop = ids.index(end, place) + 1
        inside = ids[place:stop]
        learned = [token for token, label in zip(inside, labels[place:stop], strict=True) if label != IGNORED]
        assert all(label in (IGNORED, token) for token, label in zip(inside, labels[place:stop], strict=True))
        role, _, text = tokenizer.decode(inside).removeprefix("<|im_start|>").partition("\n")
        turns.append((role, text.removesuffix("<|im_end|>"), tokenizer.decode(learned)))
        place = stop
    return turns


def read(source: Path | list[dict], tokenizer, tmp_path: Path, **keys) -> list[tuple[str, str, str]]:
    """Return the turns of the first row, without the template's own system prompt."""
    row = tokenised(source, tokenizer, tmp_path, **keys)["train"][0]
    turns = walk(tokenizer, row["input_ids"], row["labels"])
    return turns[1:] if turns[0][1].startswith("You are Qwen, created by") and "# Tools" not in turns[0][1] else turns


def learns(text: str) -> tuple[str, str, str]:
    return ("assistant", text, text + "<|im_end|>")


TIDE = [
    ("user", "Tide in Husum?", ""),
    learns(WRITTEN_CALL),
    ("user", "<tool_response>\n2.1 m\n</tool_response>", ""),
    learns("It is 2.1 m."),
]
CASES = {
    "columns_and_keys_dropped/alpacahist.jsonl": [
        ("system", "You forecast weather", ""),
        ("user", "Today?", ""),
        learns("Sun"),
        ("user", "And tomorrow?", ""),
        learns("Rain"),
    ],
    "columns_and_keys_dropped/reasoning.jsonl": [("user", "2+2?", ""), learns("<think>\nadd them\n</think>\n\nFour.")],
    "columns_and_keys_dropped/sharesys.jsonl": [
        ("system", "Answer as a pirate.", ""),
        ("user", "Hello", ""),
        learns("Arr"),
    ],
    "columns_and_keys_dropped/weight.jsonl": [
        ("user", "Name a colour", ""),
        ("assistant", "Wrong answer XX", ""),
        ("user", "Try again", ""),
        learns("Blue it is"),
    ],
    "formats_refused/contentlist.jsonl": [("user", "What is a fjord?", ""), learns("A flooded valley.")],
    "formats_refused/convpc.jsonl": [("user", "Say hi", ""), learns("hi")],
    "formats_refused/developer.jsonl": [("system", "be short", ""), ("user", "a", ""), learns("b")],
    "formats_refused/msgs_str.jsonl": [("user", "a", ""), learns("b")],
    "formats_refused/rolecase.jsonl": [("user", "a", ""), learns("b")],
    "formats_refused/sharefunc.jsonl": [
        ("user", "Tide?", ""),
        learns('<tool_call>\n{"name": "t", "arguments": {}}\n</tool_call>'),
        ("user", "<tool_response>\n2\n</tool_response>", ""),
        learns("Two"),
    ],
    "formats_refused/toolcalls.jsonl": TIDE,
    "json_dates_refused/dates_chat.jsonl": [("user", "2021-03-01", ""), learns("2021-03-01")],
}


@pytest.mark.parametrize("name", CASES)
def test_inputs_that_were_misread_or_refused(qwen, tmp_path, name):
    assert read(case(name), qwen, tmp_path) == CASES[name]


def test_the_tools_of_a_column_stand_in_the_system_prompt(qwen, tmp_path):
    path = case("columns_and_keys_dropped/toolscol.jsonl")
    system, *rest = read(path, qwen, tmp_path)
    tool = json.loads(path.read_text(encoding="utf-8").splitlines()[0])["tools"][0]
    assert system[0] == "system" and f"<tools>\n{json.dumps(tool)}\n</tools>" in system[1] and not system[2]
    assert rest == TIDE


CALLED = [{"role": "user", "content": "Tide in Husum?"}, {"role": "assistant", "tool_calls": [CALL]}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CALLED},
        {"messages": [CALLED[0], {"role": "assistant", "content": "", "tool_calls": [CALL["function"]]}]},
        {  # OpenAI's own form: the arguments are a text of JSON
            "messages": [
                CALLED[0],
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "get_tide", "arguments": '{"port":"Husum"}'}}],
                },
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "Tide in Husum?"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
            ]
        },
        {"messages": json.dumps(CALLED)},
        {"prompt": CALLED[:1], "completion": CALLED[1:]},
        {"prompt": "Tide in Husum?", "completion": CALLED[1:]},
        {
            "Messages".lower(): [
                {
                    "role": " User",
                    "content": [{"type": "text", "text": "Tide in "}, {"type": "text", "text": "Husum?"}],
                },
                CALLED[1],
            ]
        },
    ],
)
def test_a_call_is_learned_in_every_form(qwen, tmp_path, row):
    assert read([row], qwen, tmp_path) == [("user", "Tide in Husum?", ""), learns(WRITTEN_CALL)]


def test_tools_may_be_a_text_of_json_and_rows_may_lack_them(qwen, tmp_path):
    rows = [
        {"messages": CALLED, "tools": TOOLS},
        {"messages": CALLED, "tools": json.dumps(TOOLS)},
        {"messages": CALLED},
    ]
    found = tokenised(rows, qwen, tmp_path)["train"]
    assert found[0]["input_ids"] == found[1]["input_ids"] != found[2]["input_ids"]
    assert "get_tide" in qwen.decode(found[0]["input_ids"]).split("<|im_end|>")[0]
    assert found[0]["input_ids"] == qwen.apply_chat_template(CALLED, tools=TOOLS, tokenize=True)["input_ids"]


def test_arguments_that_other_rows_have_are_not_added(qwen, tmp_path):
    other = {"type": "function", "function": {"name": "get_tide", "arguments": {"city": "Kiel", "day": None}}}
    rows = [{"messages": CALLED}, {"messages": [CALLED[0], {"role": "assistant", "tool_calls": [other]}]}]
    found = [walk(qwen, row["input_ids"], row["labels"])[-1][1] for row in tokenised(rows, qwen, tmp_path)["train"]]
    assert found == [WRITTEN_CALL, WRITTEN_CALL.replace('"port": "Husum"', '"city": "Kiel", "day": null')]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_chats_of_parquet_are_the_same(qwen, tmp_path, kind):
    turn = pa.struct([("role", kind), ("content", kind), ("weight", pa.int64())])
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    chat += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    pq.write_table(pa.table({"messages": pa.array([chat], pa.list_(turn))}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", qwen, tmp_path)[1::2] == [("assistant", "b", ""), learns("d")]


@pytest.mark.parametrize("key", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_a_turn_may_be_read_without_being_learned(qwen, tmp_path, key):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"} | key]
    chat += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1, "train": True}]
    assert [turn[2] for turn in read([{"messages": chat}], qwen, tmp_path)] == ["", "", "", "d<|im_end|>"]


def test_turns_of_a_prompt_are_read_only(qwen, tmp_path):
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}
    assert [turn[2] for turn in read([row], qwen, tmp_path)] == ["", "", "", "d<|im_end|>"]


def test_what_is_left_over_is_named_once(qwen, tmp_path):
    turn = {"role": "assistant", "content": "b", "loss": 0.5, "reasoning_content": "c"}
    rows = [{"messages": [{"role": "user", "content": "a", "id": 5}, turn], "id": 1, "score": 0.5}] * 3
    assert tokenised(rows, qwen, tmp_path).notes == (
        "columns not used: id, score",
        "keys of turns not used: id, loss",
        "reasoning_content stands as <think>…</think> before the answer: the chat template has no place for it",
    )
    assert tokenised([{"text": "a", "url": "b"}], qwen, tmp_path).notes == ("columns not used: url",)
    found = tokenised(rows, qwen, tmp_path)
    data = settings(tmp_path / "rows.jsonl")
    assert make_blocks(found, qwen, data, 1)["train"].notes[:3] == found.notes


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": CALLED, "tools": "no list"}, "expected a list of tools in column 'tools', got 'no list'"),
        ({"messages": [{"role": "system", "content": "x"}], "system": "y"}, "two system prompts"),
        ({"messages": CALLED, "system": 5}, "expected a text in column 'system'"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "expected pairs of question and answer"),
        ({"messages": [CALLED[0], {"role": "assistant", "content": "b", "weight": 0.5}]}, "turn 2: expected a weight of 0 or 1"),
        ({"messages": [CALLED[0], {"role": "assistant", "content": "b", "train": "false"}]}, "turn 2: expected true or false"),
        ({"messages": [{"role": "user", "content": "b", "reasoning": "x"}, CALLED[1]]}, "turn 1: expected tool calls and thoughts in"),
        ({"messages": [CALLED[0], {"role": "assistant", "tool_calls": [{"name": "x", "arguments": "{"}]}]}, "turn 2: .*arguments"),
        ({"conversations": [{"from": "function_call", "value": "no call"}]}, "turn 1: a call in JSON"),
        ({"messages": [CALLED[0], {"role": "assistant", "content": "b", "reasoning_content": 5}]}, "turn 2: expected a text"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_its_row(qwen, tmp_path, row, problem):
    with pytest.raises(ConfigError, match=rf"^data\.dataset: row 1: .*{problem}"):
        tokenised([row], qwen, tmp_path)


AS_TEXT = "{{ '<|im_start|>call ' + c.function.name + ' ' + c.function.arguments + '<|im_end|>' }}"
PLAIN_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
ASKED = "{% if add_generation_prompt %}<|im_start|>{% endif %}"


def calling() -> dict:
    function = {"name": "look_up", "arguments": {"word": "Müller", "pages": [1, 2]}}
    answer = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    return {"messages": [{"role": "user", "content": "a"}, answer]}


def test_a_template_that_takes_arguments_as_text_gets_json(qwen, tmp_path):
    """As in functionary's: it puts texts together, which fails with a mapping."""
    call = f"{{% for c in m.tool_calls %}}{AS_TEXT}{{% endfor %}}"
    other = with_template(
        qwen,
        f"{{% for m in messages %}}{{% if m.tool_calls %}}{call}{{% else %}}{PLAIN_TURN}{{% endif %}}{{% endfor %}}{ASKED}",
    )
    found = tokenised([calling()], other, tmp_path)["train"][0]
    learned = [i for i, label in zip(found["input_ids"], found["labels"], strict=True) if label != -100]
    assert other.decode(learned) == 'call look_up {"word": "Müller", "pages": [1, 2]}<|im_end|>'


def test_a_template_that_needs_a_null_beside_calls_is_refused_with_this_reason(qwen, tmp_path):
    """As in DeepSeek-R1-Distill's; transformers removes what is null before a template sees it."""
    call = f"{{% for c in m.tool_calls %}}{AS_TEXT}{{% endfor %}}"
    shape = f"{{% for m in messages %}}{{% if m.content is none %}}{call}{{% else %}}{PLAIN_TURN}{{% endif %}}{{% endfor %}}{ASKED}"
    other, row = with_template(qwen, shape), calling()
    assert "look_up" not in other.apply_chat_template(row["messages"], tokenize=False)
    with pytest.raises(ConfigError, match=r"leaves out tool calls \(it writes them only where content is null, and"):
        tokenised([row], other, tmp_path)
    row["messages"][1]["content"] = None
    with pytest.raises(Exception, match="content"):
        other.apply_chat_template(row["messages"], tokenize=False)


def test_an_empty_answer_of_a_csv_is_refused_like_null(qwen, tmp_path):
    with pytest.raises(
        ConfigError, match=r"^data\.dataset: row 2: column 'completion' is empty; fill it in or remove the row$"
    ):
        tokenised(case("empty_answer_learned/empty.csv"), qwen, tmp_path)


def test_a_template_without_tool_calls_refuses_them(qwen, tmp_path):
    other = with_template(qwen, "{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}")
    with pytest.raises(ConfigError, match=r"row 1: turn 2: the chat template leaves out tool calls; use"):
        tokenised([{"messages": CALLED}], other, tmp_path)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tools, prompt = tokenised([{"messages": chat, "tools": TOOLS}], other, tmp_path).notes
    assert tools == "warning: the chat template does not write tools: column tools is not used"
    assert prompt.startswith(
        "warning: at inference the prompt ends with 'usera<|im_end|>'"
    )  # it has none for an answer


TURN = "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}{{% for c in m.tool_calls %}}{}{{% endfor %}}<|im_end|>\n{{% endfor %}}"
TURN += "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
WRITTEN = (
    "{{ c.function.name }}({{ c.function.arguments | tojson }})",
    "{{ c.function.name }}({{ c.function.arguments | tojson(indent=2) }})",
    "{{ c.function.name }} {{ {'arguments': c.function.arguments | tojson} | tojson }}",
    "{{ c.function.name }}({{ c.function.arguments }})",
    "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v if v is string else v | tojson }}</>{% endfor %}",
    "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v | e }}</>{% endfor %}",
)
DROPPED = (
    "{{ c.function.name }}",
    "{{ c.function.name }}({})",
    "{{ c.function.name }}({{ c.function.arguments.keys() | list | tojson }})",
    "{{ c.function.name }}({{ c.function.arguments['city'] }})",
    "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}{% if v is string %}{{ k }}={{ v }}{% endif %}{% endfor %}",
)
ARGUMENTS = {
    "city": "Köln <\"b\"> 'c' & d\ne\t\\",
    "days": 17,
    "exact": True,
    "near": {"km": [2.5, "São Paulo"]},
    "none": None,
}


@pytest.mark.parametrize("form", WRITTEN)
def test_a_template_may_write_arguments_in_many_forms(qwen, tmp_path, form):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": ARGUMENTS}]}
    tokenised([{"messages": [CALLED[0], call]}], with_template(qwen, TURN.format(form)), tmp_path)


@pytest.mark.parametrize("form", DROPPED)
@pytest.mark.parametrize("arguments", [ARGUMENTS, {"city": "t", "a": 1}])
def test_a_template_that_drops_arguments_refuses_them(qwen, tmp_path, form, arguments):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": arguments}]}
    with pytest.raises(ConfigError, match=r"row 1: turn 2: the chat template leaves out arguments of a tool call"):
        tokenised([{"messages": [CALLED[0], call]}], with_template(qwen, TURN.format(form)), tmp_path)


# ------------------------------------------------------------------------------------------------ thoughts


def chat_of(*contents: str) -> list[dict]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(contents)]


def asked(tokenizer, messages: list[dict], options: dict) -> str:
    """Return a prompt as transformers renders it for inference."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


def check_taught_as_asked(tokenizer, found, chats: list[list[dict]], answers: list[str]) -> None:
    """Each learned turn stands behind the very prompt that inference gives, and `answers` are what is learned, in order."""
    rows = [(row["input_ids"], row["labels"]) for row in found["train"]]
    got = []
    for ids, labels in rows:
        starts = [i for i in range(len(ids)) if labels[i] != IGNORED and (i == 0 or labels[i - 1] == IGNORED)]
        for start in starts:
            stop = next((i for i in range(start, len(ids)) if labels[i] == IGNORED), len(ids))
            got.append((tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:stop])))
    prompts = [
        asked(tokenizer, chat[:i], found.template_options)
        for chat in chats
        for i, message in enumerate(chat)
        if message["role"] == "assistant"
    ]
    assert got == list(zip(prompts, answers, strict=True))


def test_plain_answers_on_a_thinking_template_are_taught_as_they_are_asked(qwen, tmp_path):
    chats = [chat_of("2+2?", "Four.", "3+3?", "Six."), chat_of("1+1?", "Two.")]
    other = with_template(qwen, THINKS)
    found = tokenised([{"messages": chat} for chat in chats], other, tmp_path)
    assert found.template_options == {"enable_thinking": False}
    assert found.notes == ("no answer holds a thought: data.template_options gets enable_thinking: false",)
    check_taught_as_asked(other, found, chats, ["Four.<|im_end|>", "Six.<|im_end|>", "Two.<|im_end|>"])


def test_a_template_without_that_option_teaches_the_empty_thought(qwen, tmp_path):
    chats = [chat_of("2+2?", "Four.", "3+3?", "Six.")]
    other = with_template(qwen, THINKS.replace("enable_thinking", "other_option"))
    found = tokenised([{"messages": chats[0]}], other, tmp_path)
    empty = "<think>\n\n</think>\n\n"
    check_taught_as_asked(other, found, chats, [f"{empty}Four.<|im_end|>", f"{empty}Six.<|im_end|>"])


@pytest.mark.parametrize("own_key", [False, True])
def test_thoughts_are_learned_at_every_turn(qwen, tmp_path, own_key):
    thought, chat = "<think>\nadd them\n</think>\n\n", chat_of("2+2?", "Four.", "3+3?", "Six.")
    rows = copy.deepcopy(chat)
    for turn in rows[1::2]:
        turn |= {"reasoning_content": "add them"} if own_key else {"content": thought + turn["content"]}
    other = with_template(qwen, THINKS)
    found = tokenised([{"messages": rows}], other, tmp_path)
    check_taught_as_asked(other, found, [rows], [f"{thought}Four.<|im_end|>", f"{thought}Six.<|im_end|>"])


def test_answers_with_and_without_thoughts_are_counted(qwen, tmp_path):
    chats = [chat_of("2+2?", "<think>\nadd\n</think>\n\nFour."), chat_of("1+1?", "Two."), chat_of("1+2?", "Three.")]
    other = with_template(qwen, THINKS)
    found = tokenised([{"messages": chat} for chat in chats], other, tmp_path)
    assert found.notes == ("1 answer with a thought, 2 without: the model learns both",)
    assert "enable_thinking" not in found.template_options
    empty = "<think>\n\n</think>\n\n"
    expected = ["<think>\nadd\n</think>\n\nFour.<|im_end|>", f"{empty}Two.<|im_end|>", f"{empty}Three.<|im_end|>"]
    check_taught_as_asked(other, found, chats, expected)


def test_options_of_the_user_come_first(qwen, tmp_path):
    chat = chat_of("2+2?", "Four.")
    other = with_template(qwen, THINKS)
    found = tokenised([{"messages": chat}], other, tmp_path, template_options={"enable_thinking": True})
    assert found.template_options == {"enable_thinking": True}
    check_taught_as_asked(other, found, [chat], ["<think>\n\n</think>\n\nFour.<|im_end|>"])


def test_a_prompt_that_does_not_stand_before_the_answer_is_told(qwen, tmp_path):
    """As in R1's template: the prompt begins a thought, and answers of a chat stand without one."""
    opens = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    opens += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    (note,) = tokenised([{"messages": chat_of("a", "b")}], with_template(qwen, opens), tmp_path).notes
    assert "assistant\\n<think>\\n', which does not stand before the answers" in note


@pytest.fixture
def qwen3(qwen):
    """Qwen3's real chat template on Qwen's tokenizer."""
    template = Path(__file__).with_name("qwen3_chat_template.jinja").read_text(encoding="utf-8")
    return with_template(qwen, template)


def test_plain_answers_on_the_real_template_of_qwen3(qwen3, tmp_path):
    chats = [chat_of("2+2?", "Four.", "3+3?", "Six."), chat_of("1+1?", "Two.")]
    chats[1] = [{"role": "system", "content": "Be short."}, *chats[1]]
    found = tokenised([{"messages": chat} for chat in chats], qwen3, tmp_path)
    assert found.template_options == {"enable_thinking": False}
    check_taught_as_asked(qwen3, found, chats, ["Four.<|im_end|>", "Six.<|im_end|>", "Two.<|im_end|>"])


@pytest.mark.parametrize("own_key", [False, True])
def test_thoughts_on_the_real_template_of_qwen3(qwen3, tmp_path, own_key):
    thought = "<think>\nadd them\n</think>\n\n"
    chats = [chat_of("2+2?", "Four.", "3+3?", "Six."), chat_of("1+1?", "Two.")]
    for turn in (chats[0][1], chats[0][3], chats[1][1]):
        turn |= {"reasoning_content": "add them"} if own_key else {"content": thought + turn["content"]}
    found = tokenised([{"messages": chat} for chat in chats], qwen3, tmp_path)
    assert found.notes == () and found.template_options == {}
    expected = [f"{thought}{text}<|im_end|>" for text in ("Four.", "Six.", "Two.")]
    check_taught_as_asked(qwen3, found, chats, expected)


def test_tool_calls_on_the_real_template_of_qwen3(qwen3, tmp_path):
    called = {"role": "assistant", "content": "", "reasoning_content": "look it up", "tool_calls": [CALL]}
    chat = [{"role": "user", "content": "Tide?"}, called, {"role": "tool", "content": "High."}]
    chat += [{"role": "assistant", "content": "High.", "reasoning_content": "it is"}]
    found = tokenised([{"messages": chat, "tools": TOOLS}], qwen3, tmp_path)
    (row,) = found["train"]
    turns = [turn for turn in walk(qwen3, row["input_ids"], row["labels"]) if turn[0] == "assistant"]
    first, last = f"<think>\nlook it up\n</think>\n\n{WRITTEN_CALL}", "<think>\nit is\n</think>\n\nHigh."
    assert turns == [learns(first), learns(last)]


def test_what_stands_between_the_prompt_and_an_answer_is_learned(qwen, tmp_path):
    """As in templates of functionary, whose model first writes to whom it speaks."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %} to=all{% endif %}"
        "{{ '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    chats, other = [chat_of("2+2?", "Four.", "3+3?", "Six.")], with_template(qwen, template)
    found = tokenised([{"messages": chats[0]}], other, tmp_path)
    assert found.notes == ()
    check_taught_as_asked(other, found, chats, [" to=all\nFour.<|im_end|>", " to=all\nSix.<|im_end|>"])


def test_a_template_that_needs_tools_takes_them(qwen, tmp_path):
    """As those of Hermes 2 Pro: without tools they fail."""
    needs = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}" + qwen.chat_template
    found = tokenised([{"messages": CALLED, "tools": TOOLS}], with_template(qwen, needs), tmp_path)
    assert found.notes == () and len(found["train"]) == 1


def test_a_prompt_before_any_turn_is_looked_at(qwen, tmp_path):
    """Only the last answer holds a thought; before the first one the prompt opens a thought that the data do not have."""
    opens = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    opens += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    chat = chat_of("2+2?", "Four.", "3+3?", "<think>\nadd\n</think>\n\nSix.")
    notes = tokenised([{"messages": chat}], with_template(qwen, opens), tmp_path).notes
    assert any("<think>\\n', which does not stand before the answers" in note for note in notes)


def test_where_all_tokens_are_learned_no_turn_needs_to_be_found(qwen, tmp_path):
    rows = [{"messages": chat_of("2+2?", "<think>\nadd\n</think>\n\nFour.", "a", "<think>\nb\n</think>\n\nc")}]
    (row,) = tokenised(rows, with_template(qwen, THINKS), tmp_path, completion_only=False)["train"]
    assert row["labels"] == row["input_ids"]


def test_samples_of_a_row_are_held_out_together_and_count_as_a_row(qwen, tmp_path):
    rows = [{"messages": chat_of(f"{i}a?", f"{i}b.", f"{i}c?", f"{i}d.")} for i in range(20)]
    other = with_template(qwen, THINKS)
    found = tokenised(rows, other, tmp_path)
    assert len(found["train"]) == 40
    data = settings(tmp_path / "rows.jsonl", validation_fraction=0.25, packing=False, max_train_samples=3)
    parts = make_blocks(found, other, data, 1)

    def numbers(part) -> list[str]:
        return [other.decode(part[i][0]).split("user\n")[1].split("a?")[0] for i in range(len(part))]

    held, kept = numbers(parts["validation"]), numbers(parts["train"])
    assert (parts["validation"].rows, parts["train"].rows) == (5, 3)
    assert (len(held), len(kept), len(set(held)), len(set(kept))) == (10, 6, 5, 3) and not set(held) & set(kept)


def test_thinking_inputs_that_were_refused(tmp_path, tiny_model):
    """The cases of ../shared/cases/thinking_data, on the model that its mk.py makes."""
    import subprocess
    import sys

    script = case("turn_end_not_a_stop/mk.py")
    subprocess.run([sys.executable, str(script), str(tiny_model), str(tmp_path)], check=True)
    tokenizer = load_tokenizer(str(tmp_path / "thinkish"))
    (think, plain) = (tokenised(case(f"thinking_data/{n}.jsonl"), tokenizer, tmp_path) for n in ("think1", "nothink2"))
    (turns,) = (walk(tokenizer, row["input_ids"], row["labels"]) for row in think["train"].select([0]))
    assert turns == [("user", "2+2?", ""), learns("<think>\nadd them\n</think>\n\nFour.")]
    last = [walk(tokenizer, row["input_ids"], row["labels"])[-1] for row in plain["train"].select([0, 1])]
    assert [(text, learned) for _, text, learned in last] == [
        ("<think>\n\n</think>\n\nFour.", "Four.<|im_end|>"),
        ("<think>\n\n</think>\n\nSix.", "Six.<|im_end|>"),
    ]


# ------------------------------------------------------------------------------------------------ the plain template


def test_the_plain_template_begins_as_the_tokenizer_begins_a_text(tmp_path, tiny_model):
    import subprocess
    import sys

    script = case("turn_end_not_a_stop/mk.py")
    subprocess.run([sys.executable, str(script), str(tiny_model), str(tmp_path)], check=True)
    tokenizer = load_tokenizer(str(tmp_path / "llama2base"))
    found = tokenised([{"messages": chat_of("hi", "ho")}], tokenizer, tmp_path)
    ids = found["train"][0]["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == tokenizer("hi")["input_ids"][0] and ids.count(ids[0]) == 1
    assert tokenizer.decode(ids) == "<s>User: hi\nAssistant: ho</s>\n"
    shutil.rmtree(tmp_path / "llama2base")
