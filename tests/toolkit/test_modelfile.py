"""The Modelfile of a merged model: its template against Jinja's own rendering, its parameters, what it cannot hold."""

import json
import re
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerFast

from config import GenerationConfig
from tests.conftest import ROOT
from toolkit.modelfile import NotEqual, go_template, modelfile, next_commands

CHATML = (ROOT / "tiny" / "model").as_posix()
# What Go's documentation of text/template says of each action that a Modelfile of ours has, in the words of Jinja.
MEANS = {
    'if ne (index .Messages 0).Role "system"': "{% if messages[0].role != 'system' %}",
    "range $i, $m := .Messages": "{% for m in messages %}",
    "$last := eq (len (slice $.Messages $i)) 1": "{% set last = messages[loop.index0:] | length == 1 %}",
    'if eq $m.Role "system"': "{% if m.role == 'system' %}",
    'else if eq $m.Role "user"': "{% elif m.role == 'user' %}",
    'else if eq $m.Role "assistant"': "{% elif m.role == 'assistant' %}",
    "if not $last": "{% if not last %}",
    'if and $last (ne $m.Role "assistant")': "{% if last and m.role != 'assistant' %}",
    "$m.Content": "{{ m.content }}",
}
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATS = [
    [("user", 'He said "no" \\ {{ x }}\n漢字')],
    [("system", "s"), ("user", "a"), ("assistant", ""), ("user", " b ")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(CHATML)


def as_go_renders(template: str, messages: list[dict[str, str]]) -> str:
    """Return a chat as Go would, for the actions that MEANS has."""
    opened, parts = [], []
    for text, action in re.findall(r"([^{]*)\{\{ ((?:\"(?:[^\"\\]|\\.)*\"|(?!\}\}).)*) \}\}", template, re.DOTALL):
        assert text == "", "text outside of an action"
        if action == "end":
            parts.append("{% end" + opened.pop() + " %}")
        elif action.startswith('"'):
            parts.append("{{ " + repr(json.loads(action)) + " }}")
        else:
            parts.append(MEANS[action])
            opened += [{"if": "if", "range": "for"}[action.split()[0]]] if action.split()[0] in ("if", "range") else []
    assert not opened
    return ImmutableSandboxedEnvironment().from_string("".join(parts)).render(messages=messages)


@pytest.mark.parametrize("template", [None, DEFAULT_SYSTEM])
def test_the_template_writes_what_the_models_own_does(tokenizer, template):
    tokenizer.chat_template = template or tokenizer.chat_template
    for chat in CHATS:
        messages = [{"role": role, "content": text} for role, text in chat]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert as_go_renders(go_template(tokenizer, {}), messages) == expected


def test_an_answer_that_has_begun_is_continued(tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The sea"}]
    assert as_go_renders(go_template(tokenizer, {}), messages).endswith("<|im_start|>assistant\nThe sea")


ONE = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
LOOP = "{% for m in messages %}" + ONE + "{% endfor %}"
ODD = {
    "trims": (LOOP.replace("m.content", "m.content | trim"), "reads or changes what a message says"),
    "reads a word": (LOOP.replace("m.content", "m.content.split('</think>')[-1]"), "reads or changes"),
    "looks for a word": (
        "{% for m in messages %}{% if '/no_think' in m.content %}!{% endif %}" + ONE + "{% endfor %}",
        "/no_think",
    ),
    "counts": (
        "{% for m in messages %}{{ loop.index }}" + ONE + "{% endfor %}",
        "first message of a chat in another way",
    ),
    "refuses systems": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no systems') }}{% endif %}"
        + ONE
        + "{% endfor %}",
        "no systems",
    ),
    "leaves systems out": (
        "{% for m in messages %}{% if m.role != 'system' %}" + ONE + "{% endif %}{% endfor %}",
        "a system message",
    ),
    "the last alone": ("{% set m = messages[-1] %}" + ONE, "after the messages before it"),
    "the date": ("{{ strftime_now('%d') }}" + LOOP, "the date"),
    "long chats": (LOOP + "{% if messages | length > 30 %}long{% endif %}", "reads or changes"),
}


@pytest.mark.parametrize("template, reason", ODD.values(), ids=ODD)
def test_a_template_that_no_modelfile_can_hold_is_said_and_the_rest_written(tokenizer, template, reason):
    tokenizer.chat_template = template + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    with pytest.raises(NotEqual, match=re.escape(reason)):
        go_template(tokenizer, {})
    text, lines = modelfile(tokenizer, [tokenizer.eos_token_id], GenerationConfig(), {})
    assert len(lines) == 1 and "the chat template cannot be said" in lines[0] and "\n" not in lines[0]
    assert "TEMPLATE" not in text and 'PARAMETER stop "<|im_end|>"' in text and "\nFROM ./model.gguf\n" in text
    assert all(line.startswith(("#", "FROM", "PARAMETER")) for line in text.splitlines() if line)


def test_a_thinking_template_is_not_taken_for_a_plain_one(tokenizer):
    tokenizer.chat_template = Path(__file__).with_name("qwen3_chat_template.jinja").read_text(encoding="utf-8")
    for options in ({}, {"enable_thinking": False}):
        with pytest.raises(NotEqual):
            go_template(tokenizer, options)


def test_a_token_that_readers_put_first_is_not_written_twice(tokenizer):
    tokenizer.bos_token = "<|im_start|>"  # any; here it begins each message too
    tokenizer.chat_template = "{{ bos_token }}" + LOOP + "{% if add_generation_prompt %}A:{% endif %}"
    with_bos = go_template(tokenizer, {})  # this tokenizer does not add it, so the template has to
    assert with_bos.count("<|im_start|>") == 1 + 3 + 1  # head, three roles, and before a system message


def test_a_model_without_a_template_gets_the_prompt_as_it_is(tokenizer):
    tokenizer.chat_template = None
    assert go_template(tokenizer, {}) == "{{ .Prompt }}"


def test_parameters_are_the_effective_settings(tokenizer):
    settings = GenerationConfig(
        temperature=0.25, top_k=None, repetition_penalty=1.1, max_new_tokens=1_000_000, num_beams=4
    )
    text, lines = modelfile(tokenizer, tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]), settings, {})
    found = dict(re.findall(r"^PARAMETER (\w+) (.+)$", text, re.MULTILINE))
    assert found == {
        "stop": '"<|endoftext|>"', "temperature": "0.25", "top_p": "0.9", "top_k": "0", "min_p": "0",
        "repeat_penalty": "1.1", "num_predict": "1000000", "repeat_last_n": "-1",
    }  # fmt: skip
    assert text.count("PARAMETER stop") == 2
    assert (
        lines == ["Modelfile: generation.num_beams 4: Ollama has no beam search"]
        and "# not in here: generation.num" in text
    )


def test_end_tokens_are_written_as_answers_show_them(tokenizer):
    line_break, wide = tokenizer("\n")["input_ids"][-1], tokenizer(" the")["input_ids"][-1]
    text, lines = modelfile(tokenizer, [line_break, wide, 10**6], GenerationConfig(), {})
    assert tokenizer.decode([wide]) == " the" and re.findall("^PARAMETER stop .*$", text, re.M) == [
        'PARAMETER stop " the"'
    ]
    assert [line.split(" cannot")[0] for line in lines] == [
        f"Modelfile: the end token {line_break}, '\\n',",
        "Modelfile: the end token 1000000, '',",
    ]


@pytest.mark.parametrize("prompt, held", [("Be\nbrief.", True), ('Say """', False), ('End with "', False)])
def test_a_system_prompt_is_written_or_said_to_be_missing(tokenizer, prompt, held):
    text, lines = modelfile(tokenizer, [], GenerationConfig(system_prompt=prompt), {})
    assert (f'SYSTEM """{prompt}"""' in text) is held and bool(lines) is not held


def test_commands_can_be_copied(tmp_path):
    lines = next_commands(tmp_path / "my model; rm")
    assert all("'" in line for line in lines[1:]) and "ollama create my-model-rm -f" in lines[3]
    assert [line.split()[0] for line in lines[1:]] == ["transformers", "python", "ollama", "vllm"]
