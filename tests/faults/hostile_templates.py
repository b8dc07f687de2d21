"""Chat templates that a stranger could send: in a model's files, or in an adapter's."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.adversary import CODE, Attack, Ended, Ground, ask, train

Build = Callable[[Path, Ground], Attack]
CHAT = [
    {"role": "user", "content": "Who goes there?"},
    {"role": "assistant", "content": "A friend of the king."},
    {"role": "user", "content": "Stand and unfold yourself."},
    {"role": "assistant", "content": "Long live the king!"},
]
SOUND = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
FILE = r"tokenizer_config\.json: the chat template "


def model(folder: Path, ground: Ground, template: Any = None, **files: bytes) -> Path:
    """Return a copy of the model with this in its tokenizer_config.json; files: the content of chat_template.jinja and others."""
    made = ground.copy("model", folder / "model")
    settings = json.loads((made / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["chat_template"]
    settings |= {} if template is None else {"chat_template": template}
    (made / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    for name, content in files.items():
        path = (
            made / "additional_chat_templates" / f"{name}.jinja" if name != "chat_template" else made / f"{name}.jinja"
        )
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return made


def asked(template: Any, says: str = FILE, codes: tuple[int, ...] = (2,), **files: bytes) -> Build:
    """Return a function that builds a prompt to a model with this template."""

    def build(folder: Path, ground: Ground) -> Attack:
        made = model(folder, ground, template, **files)
        return ask("--adapter", "none", "--model_name", made, says=says, codes=codes)

    return build


def trained(
    template: Any, says: str = FILE, codes: tuple[int, ...] = (2,), chats: tuple = (CHAT, CHAT), *flags: str
) -> Build:
    """Return a function that builds a training run on chats with this template."""

    def build(folder: Path, ground: Ground) -> Attack:
        rows = folder / "chats.jsonl"
        rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
        made = model(folder, ground, template)
        return train("--model_name", made, "--dataset", rows, *flags, says=says, codes=codes)

    return build


def placed(put: Callable[[Path], object], says: str, name: str = "chat_template.jinja") -> Build:
    """Return a function that puts something in the place of a template's file in the model's folder."""

    def build(folder: Path, ground: Ground) -> Attack:
        made = model(folder, ground, SOUND)
        (made / name).parent.mkdir(exist_ok=True)
        put(made / name)
        return ask("--adapter", "none", "--model_name", made, says=says, codes=(2,))

    return build


def adapted(
    put: Callable[[Path], object], says: str, *flags: str, name: str = "chat_template.jinja", code: int = 2
) -> Build:
    """Return a function that puts something in the place of a template's file in an adapter's folder."""

    def build(folder: Path, ground: Ground) -> Attack:
        adapter, made = ground.copy("finished", folder / "adapter"), model(folder, ground)
        settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = str(made)
        (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
        put(adapter / name)
        return ask("--adapter", adapter, "--model_name", made, *flags, says=says, codes=(code,))

    return build


def wrote(content: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**30)


def linked_secret(path: Path) -> None:
    secret = path.parent.parent / "id_rsa"
    secret.write_text("a key {{ messages[0].content }}")
    path.symlink_to(secret)


def mode(name: str, *flags: object, input: str | None = None, codes: tuple[int, ...] = (2,)) -> Build:
    """Return a function that uses a template that fails in another mode of inference_example.py."""

    def build(folder: Path, ground: Ground) -> Attack:
        (folder / "prompts.txt").write_text("To be\nOr not\n")
        first = ["--adapter", "none", "--model_name", model(folder, ground, "{{ 1/0 }}"), "--mode", name]
        return Attack(
            "inference_example", [*first, *flags], says=FILE + "fails: ZeroDivisionError", input=input, codes=codes
        )

    return build


def evaluated(folder: Path, ground: Ground) -> Attack:
    attack = trained("{{ 1/0 }}")(folder, ground)
    attack.flags += ["--evaluate"]
    return attack


def merged(folder: Path, ground: Ground) -> Attack:
    """Names of templates become names of files in the merged model."""
    made = model(folder, ground, [{"name": "default", "template": SOUND}, {"name": "../../evil", "template": SOUND}])
    flags = ["--adapter", ground.finished, "--model_name", made, "--mode", "merge", "--output", "output"]
    return Attack("inference_example", flags, says="expected a name of letters and digits", codes=(2,))


def merged_secret(folder: Path, ground: Ground) -> Attack:
    attack = adapted(linked_secret, "expected a chat template, got a link")(folder, ground)
    return Attack(
        "inference_example", [*attack.flags[6:], "--mode", "merge", "--output", "output"], says=attack.says, codes=(2,)
    )


def text_only(folder: Path, ground: Ground) -> Attack:
    """Plain text does not go through the template, so that it does no harm."""
    return train("--model_name", model(folder, ground, "{{ 1/0 }}"), codes=(0,))


def same_answer(folder: Path, ended: Ended) -> list[str]:
    return [] if "warning" not in ended.stderr else [f"a warning: {ended.stderr}"]


def sound(template: str) -> Build:
    """A template as they are: it answers, and nothing is said about it."""

    def build(folder: Path, ground: Ground) -> Attack:
        attack = asked(template, says="tokens/s", codes=(0,))(folder, ground)
        attack.check = same_answer
        return attack

    return build


RUN = f"exec({CODE!r})"
SECONDS, MEMORY = FILE + "fails: it does not end within 10 s", FILE + "fails: (MemoryError|OverflowError|it gives)"
INJECTIONS = {  # each would run CODE, or show what it must not, if a part of the sandbox were missing
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch $CANARY/canary') }}",
    "joiner": "{{ joiner.__init__.__globals__.os.system('touch $CANARY/canary') }}",
    "namespace": "{{ namespace.__init__.__globals__.__builtins__." + RUN + " }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('touch $CANARY/canary') }}",
    "raise_exception": "{{ raise_exception.__globals__.__builtins__." + RUN + " }}",
    "strftime_now": "{{ strftime_now.__globals__['__builtins__']." + RUN + " }}",
    "attr filter": "{{ (''|attr('__class__')|attr('__mro__'))[1]|attr('__subclasses__')() }}",
    "map attribute": "{{ [lipsum]|map(attribute='__globals__')|map(attribute='os')|list|first|attr('getcwd')() }}",
    "item": "{{ lipsum['__globals__']['os']['getcwd']() }}",
    "self": "{{ self._TemplateReference__context.environment.from_string('a').root_render_func.__globals__.os.getcwd() }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__['__builtins__'].open('/etc/passwd').read() }}",
    "caller": "{% macro m() %}{{ caller.__globals__.os.getcwd() }}{% endmacro %}{% call m() %}{% endcall %}",
    "generator": "{{ (messages|map('upper')).gi_frame.f_back.f_globals }}",
    "loop": "{% for m in messages %}{{ loop.__init__.__globals__.os.getcwd() }}{% endfor %}",
    "format map": "{{ '{a.__globals__}'.format_map({'a': lipsum}) }}",
    "dict": "{{ dict.__class__.__init__.__globals__.sys.modules.os.getcwd() }}",
    "underscore": "{% set n = namespace() %}{% set n.__class__ = 5 %}{{ n.__class__.__name__.a.b }}",
}
BOMBS = {
    "nested ranges": ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", SECONDS),
    "power": ("{{ 10 ** (10 ** 10) }}", FILE + "fails"),
    "string": ("{{ 'a' * 10 ** 10 }}", MEMORY),
    "list": ("{{ [1] * 10 ** 10 }}", MEMORY),
    "width": ("{{ '%0999999999d' | format(1) }}", MEMORY),
    "format": ("{{ '{:>9999999999}'.format(1) }}", FILE + "fails"),
    "ljust": ("{{ 'a'.ljust(10 ** 10) }}", MEMORY),
    "center": ("{{ 'a' | center(10 ** 10) }}", MEMORY),
    "indent": ("{{ 'a\nb' | indent(10 ** 10) }}", MEMORY),
    "batch": ("{{ [1] | batch(10 ** 10, 0) | list }}", FILE + "fails"),
    "replace": ("{{ ('a' * 10 ** 5) | replace('a', 'a' * 10 ** 5) }}", MEMORY),
    "tojson": ("{{ messages | tojson(indent=10 ** 10) }}", MEMORY),
    "lipsum": ("{{ lipsum(n=10 ** 8) }}", FILE + "fails"),
    "doubling": (
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
        MEMORY,
    ),
    "long text": ("{{ 'a' * 10 ** 7 }}", FILE + "fails: it gives 10,000,000 characters"),
    "strftime": ("{{ strftime_now('%0999999999d' * 10) }}", FILE + "fails"),
    "macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", FILE + "fails: RecursionError"),
    "two macros": (
        "{% macro g(n) %}{{ f(n) }}{% endmacro %}{% macro f(n) %}{% for i in range(9) %}{{ g(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
        FILE + "fails: RecursionError",
    ),
    "fork of macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        SECONDS,
    ),
    "recursive loop": ("{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}", FILE + "fails: RecursionError"),
    "brackets": ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", FILE + "fails: RecursionError"),
    "sums": ("{{ " + "+".join("1" * 50_000) + " }}", FILE + "fails"),
    "lists": ("{{ " + "[" * 500 + "]" * 500 + " }}", FILE + "fails|tokens/s"),
    "blocks": ("{% if 1 %}" * 2_000 + "a" + "{% endif %}" * 2_000, FILE + "fails"),
}
BROKEN = {
    "division": ("{{ 1/0 }}", FILE + "fails: ZeroDivisionError: division by zero"),
    "types": ("{{ 'a' + 1 }}", FILE + "fails: TypeError"),
    "undefined": ("{{ nothing.at.all }}", FILE + "fails: UndefinedError: 'nothing' is undefined"),
    "filter": ("{{ 'a' | nothing }}", FILE + "fails: TemplateAssertionError: No filter named 'nothing'"),
    "include": ("{% include '/etc/passwd' %}", FILE + "fails: TypeError: no loader"),
    "import": ("{% import 'os' as os %}{{ os.getcwd() }}", FILE + "fails: TypeError: no loader"),
    "extends": ("{% extends 'base' %}", FILE + "fails: TypeError: no loader"),
    "syntax": ("{% for %}", FILE + r"fails: TemplateSyntaxError: .*\(line 1\)"),
    "half a tag": ("{% generation %}a", FILE + "fails: TemplateSyntaxError"),
    "generation in a name": ("{% generation %}{{ 1/0 }}{% endgeneration %}", FILE + "fails: ZeroDivisionError"),
    "escapes": (
        r"{{ raise_exception('\x1b[2J\x1b]52;c;YQ==\x07 \x9b no') }}",
        FILE + r"refuses these messages: \\x1b\[2J",
    ),
    "escapes in a name": ('{{ "\\x1b[2J".nothing.a }}', FILE + "fails: UndefinedError"),
    "long words": ("{{ raise_exception('a ' * 10 ** 6) }}", FILE + "refuses these messages: a a"),
    "a number": ("{{ raise_exception(5) }}", FILE + "refuses these messages: 5"),
    "clear": ("{{ messages.clear() }}", FILE + "fails: SecurityError"),
    "half a character": (r"{{ '\ud800' }}", FILE + "fails: UnicodeEncodeError"),
    "nothing": ("{% set a = 1 %}", FILE + "fails: it gives no text"),
}
TYPES = {
    "number": 5,
    "true": True,
    "empty": "",
    "spaces": " \n ",
    "list of texts": ["{{ messages }}"],
    "list of lists": [["default", SOUND]],
    "no name": [{"template": SOUND}],
    "no text": [{"name": "default", "template": None}],
    "number as a name": [{"name": 5, "template": SOUND}],
    "path as a name": [{"name": "../../default", "template": SOUND}],
    "mapping": {"default": 5},
    "long": "a" * 2_000_000,
}
NOT_UTF8 = b"{{ messages[0].content }} caf\xe9"
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are"
    " a helpful AI assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = "{% for m in messages %}\ufdd0{{ m.content }}\ufdd1{% endfor %}"
LATE = "{% if messages|length > 2 %}{{ 'a' * 10 ** 10 }}{% endif %}" + SOUND
LATE_LOOP = (
    "{% if messages|length > 3 and 'live' in messages[3].content %}"
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}{% endif %}" + SOUND
)
HIDDEN = r"row 1: .*rewrites an answer of the assistant"
NO_TEXT = FILE + "fails: it gives no text"  # of a prompt: neither training nor inference can use it

ATTACKS: dict[str, Build] = {
    **{f"injection {name}": asked(text, FILE) for name, text in INJECTIONS.items()},
    **{f"bomb {name}": asked(text, says, (0, 2)) for name, (text, says) in BOMBS.items()},
    **{f"broken {name}": asked(text, says) for name, (text, says) in BROKEN.items()},
    **{
        f"type {name}": asked(value, r"tokenizer_config\.json: chat_template: expected")
        for name, value in TYPES.items()
    },
    "no default": asked([{"name": "tool_use", "template": SOUND}], FILE + "fails: .*no default"),
    "jinja file": asked(SOUND, r"chat_template\.jinja: the chat template fails", chat_template=b"{{ 1/0 }}"),
    "jinja file not utf8": asked(
        SOUND, r"chat_template\.jinja: expected a chat template in UTF-8", chat_template=NOT_UTF8
    ),
    "named file not utf8": asked(SOUND, r"other\.jinja: expected a chat template in UTF-8", other=NOT_UTF8),
    "pipe": placed(os.mkfifo, r"chat_template\.jinja: .* got a pipe"),
    "pipe as a named file": placed(os.mkfifo, r"a\.jinja: .* got a pipe", "additional_chat_templates/a.jinja"),
    "folder": placed(Path.mkdir, r"chat_template\.jinja: .* got a folder"),
    "broken link": placed(lambda path: path.symlink_to("nowhere.jinja"), r"chat_template\.jinja: .* got a broken link"),
    "endless link": placed(
        lambda path: path.symlink_to("/dev/zero"), r"chat_template\.jinja: .* got a link to /dev/zero"
    ),
    "link to itself": placed(lambda path: path.symlink_to(path), r"chat_template\.jinja: .* got a broken link"),
    "secret": placed(linked_secret, r"chat_template\.jinja: .* got a link to .*id_rsa"),
    "a gigabyte": placed(sparse, r"chat_template\.jinja: chat_template: expected at most"),
    "adapter division": adapted(wrote("{{ 1/0 }}"), r"adapter/chat_template\.jinja: the chat template fails"),
    "adapter loop": adapted(
        wrote(BOMBS["nested ranges"][0]), r"adapter/chat_template\.jinja: .*does not end within 10 s"
    ),
    "adapter injection": adapted(wrote(INJECTIONS["cycler"]), r"adapter/chat_template\.jinja: the chat template fails"),
    "adapter not utf8": adapted(wrote(NOT_UTF8), r"adapter/chat_template\.jinja: expected a chat template in UTF-8"),
    "adapter empty": adapted(
        wrote(""), r"adapter/chat_template\.jinja: chat_template: expected a text that is not empty"
    ),
    "adapter pipe": adapted(os.mkfifo, r"adapter/chat_template\.jinja: .* got a pipe"),
    "adapter broken link": adapted(
        lambda path: path.symlink_to("no.jinja"), r"adapter/chat_template\.jinja: .* broken link"
    ),
    "adapter settings": adapted(
        wrote('{"chat_template": "{{ 1/0 }}"}'), "no chat template", name="tokenizer_config.json", code=0
    ),
    "adapter secret merged": merged_secret,
    "merge path": merged,
    "demo": mode("demo"),
    "interactive": mode("interactive", input="Hello\n/quit\n", codes=(0,)),
    "prompts": mode("text", "--prompts", "prompts.txt", "--output", "answers.jsonl"),
    "evaluation": evaluated,
    "plain text": text_only,
    "drops the question": asked("Hello there", "warning: .* leaves out or changes what the user", (0,)),
    "rewrites the question": asked("{{ messages[0].content | replace('be', 'kill') }}", "warning: .* leaves out", (0,)),
    "training division": trained("{{ 1/0 }}", "row 1: .*" + FILE + "fails: ZeroDivisionError"),
    "training injection": trained(INJECTIONS["lipsum"], "row 1: .*" + FILE),
    "training refusal": trained(BROKEN["escapes"][0], BROKEN["escapes"][1]),
    "training late bomb": trained(LATE, "row 3: .*MemoryError", chats=(CHAT[:2], CHAT[:2], CHAT, CHAT)),
    "training late loop": trained(LATE_LOOP, "row 2: .*10 s", chats=(CHAT[:2], CHAT, CHAT)),
    "training drops answers": trained("{% for m in messages %}{{ m.role }}{% endfor %}", HIDDEN),
    "training drops a turn": trained("{% for m in messages[:-1] %}{{ m.content }}{% endfor %}", NO_TEXT),
    "training shows an answer early": trained("{{ messages[-1].content }}" + SOUND, HIDDEN),
    "training reverses answers": trained("{% for m in messages %}{{ m.content | reverse }}{% endfor %}", HIDDEN),
    "training writes marks": trained(
        MARKED, "first block: .*\\[\\[.[A-Z]", (0,)
    ),  # what it writes after the prompt, no more
    "training at random": trained("{{ range(100000) | random }}" + SOUND, HIDDEN),
    "training drops questions": trained(
        "{% for m in messages if m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endfor %}", NO_TEXT
    ),
    "training on nothing": trained("{% set a = 1 %}", FILE + "fails: it gives no text"),
    "sound": sound(SOUND + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
    "sound SmolLM2": sound(SMOLLM2),
}
