"""The only place where a chat template is rendered: the same text as transformers gives, within limits."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from config import ConfigError, ModelConfig
from tests.faults.hostile_templates import CHAT, SMOLLM2, SOUND
from tests.toolkit.test_data import QWEN_TEMPLATE
from toolkit import template_child
from toolkit.chat_templates import CHILD, adopt_template, changes_words, prepare_child, render_chats
from toolkit.template_files import check_template_files

OTHERS = [
    SMOLLM2,
    SOUND,
    "{{ bos_token }}{% for m in messages %}{% generation %}{{ m | tojson(indent=2) }}{% endgeneration %}\n{% endfor %}\n",
    "  {%- set ns = namespace(n=0) %}\n  {% for m in messages %}\n{% set ns.n = ns.n + 1 %}{{ ns.n ~ m.content }}{% break %}\n{% endfor %}",
    "{{ dict(a=1) }}{{ tools is none }}{{ documents is defined }}{{ strftime_now('%Y') }}{{ '<é🙂&>' }}",
]


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_model)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.mark.parametrize("template", [None, "Qwen2.5", *OTHERS])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_that_of_transformers(tokenizer, template, prompt):
    if template == "Qwen2.5" and not QWEN_TEMPLATE.is_file():
        pytest.skip(f"no {QWEN_TEMPLATE}")
    template = QWEN_TEMPLATE.read_text(encoding="utf-8") if template == "Qwen2.5" else template
    other = with_template(tokenizer, template or tokenizer.chat_template)
    chats = [
        CHAT,
        [{"role": "system", "content": "größer 🙂 \x00"}, *CHAT[:1]],
        [CHAT[0] | {"content": "a\r\n" * 40_000}],
    ]
    expected = [other.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt) for chat in chats]
    assert list(render_chats(other, chats, add_generation_prompt=prompt)) == expected


def test_the_whole_package_gives_the_same_where_the_module_alone_does_not_import(tmp_path):
    """Another version of transformers may have moved what the short import needs."""
    program = (
        "import types; from toolkit import template_child; real = types.ModuleType\n"
        "def broken(name): types.ModuleType = real; raise AttributeError(name)\n"
        "types.ModuleType = broken; render = template_child.import_renderer()\n"
        "print(render([[{'role': 'user', 'content': 'a'}]], chat_template='{{ messages[0].content }}')[0])"
    )
    root = Path(template_child.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, encoding="utf-8")
    assert done.stdout == "['a']\n", done.stderr


def test_after_a_chat_that_ends_the_process_comes_the_next(tokenizer, monkeypatch):
    """What was rendered before the one at fault is given, and another process renders what comes after."""
    other = with_template(tokenizer, "{{ messages[0].content }}")
    expected = [CHAT[0]["content"]]
    assert list(render_chats(other, [CHAT])) == expected
    CHILD.process.kill()  # from outside, between two chats: not the template's fault
    CHILD.process.wait()
    assert list(render_chats(other, [CHAT])) == expected
    CHILD.stop()
    dying = [
        sys.executable,
        "-c",
        'import sys; sys.stdin.readline(); print(\'{"text": "a"}\', flush=True); sys.exit(7)',
    ]
    process = subprocess.Popen(dying, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    monkeypatch.setattr(CHILD, "process", process)
    found = render_chats(other, [CHAT, CHAT])
    assert next(found) == "a"
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: the chat template fails: .* ended \(exit code 7\)"):
        next(found)
    assert list(render_chats(other, [CHAT])) == expected


def test_the_row_at_fault_is_found_among_others(tokenizer):
    other = with_template(tokenizer, "{% if messages|length > 2 %}{{ 1/0 }}{% endif %}a")
    found = render_chats(other, [CHAT[:1], CHAT[:2], CHAT, CHAT[:1]])
    assert [next(found), next(found)] == ["a", "a"]
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        next(found)


def test_nothing_is_imported_from_the_current_folder(tokenizer, tmp_path, monkeypatch):
    CHILD.stop()
    for name in ("jinja2", "transformers", "json", "faulthandler"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert list(render_chats(tokenizer, [CHAT])) == [tokenizer.apply_chat_template(CHAT, tokenize=False)]
    assert not (tmp_path / "ran").exists()


def test_the_process_ends_with_its_parent(tmp_path, tiny_model):
    program = (
        "from toolkit.chat_templates import CHILD, render_chats; from transformers import PreTrainedTokenizerFast as T\n"
        f"list(render_chats(T.from_pretrained({str(tiny_model)!r}), [{CHAT!r}]))\n"
        "print(CHILD.process.pid, flush=True); import os; os.kill(os.getpid(), 9)"
    )
    root = Path(template_child.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True)
    child = int(done.stdout)
    for _ in range(100):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return
        if state == "Z":  # nobody has fetched its exit code
            return
        subprocess.run(["sleep", "0.05"])
    pytest.fail("it still runs")


def test_an_adapters_template_is_used_where_the_model_has_none(tokenizer, tmp_path):
    adapter = tmp_path / "adapter" / "checkpoint-2"
    adapter.mkdir(parents=True)
    (adapter.parent / "chat_template.jinja").write_text("{{ 1/0 }}\r\n", encoding="utf-8")
    own = tokenizer.chat_template
    adopt_template(tokenizer, adapter)
    assert tokenizer.chat_template == own
    tokenizer.chat_template = None
    adopt_template(tokenizer, None)
    assert tokenizer.chat_template is None
    adopt_template(tokenizer, adapter)
    assert tokenizer.chat_template == "{{ 1/0 }}\n"
    with pytest.raises(ConfigError, match=r"adapter/chat_template\.jinja: the chat template fails"):
        list(render_chats(tokenizer, [CHAT]))


@pytest.mark.parametrize("template", [None, SOUND, [{"name": "default", "template": SOUND}], {"tool_use": SOUND}])
def test_sound_files_pass(tmp_path, template):
    """Also as the hub's cache stores them: links to files in `blobs`, whose names are hashes."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a1b").write_text(SOUND, encoding="utf-8")
    model = tmp_path / "snapshots" / "main"
    (model / "additional_chat_templates").mkdir(parents=True)
    (model / "chat_template.jinja").symlink_to("../../blobs/0a1b")
    (model / "additional_chat_templates" / "rag.jinja").write_text(SOUND, encoding="utf-8")
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    check_template_files(str(model))
    check_template_files("owner/name-on-the-hub")


def test_left_out_words_are_noticed():
    assert not changes_words(CHAT, SOUND + "".join(turn["content"] for turn in CHAT))
    assert not changes_words([CHAT[0] | {"content": " padded \n"}], "user: padded")
    assert not changes_words([CHAT[1]], "answers are trimmed and cut by many templates")
    assert changes_words(CHAT[:1], "user: who goes there?")
    assert changes_words([{"role": "system", "content": "Be brief."}], "user: hi")


def test_the_process_that_renders_starts_early_only_for_a_model_with_a_template(tmp_path, tiny_model):
    settings = json.loads((tiny_model / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    for model, starts in ((tmp_path, False), (tiny_model, True), ("nobody/not-here-yet", True)):
        CHILD.stop()
        prepare_child(ModelConfig(name=str(model)))
        assert (CHILD.process is not None) == starts, model
    CHILD.stop()
    (tmp_path / "chat_template.jinja").write_text(SOUND, encoding="utf-8")
    prepare_child(ModelConfig(name=str(tmp_path)))
    assert CHILD.process is not None
    CHILD.stop()
