"""Upload a finished run's adapter to the Hugging Face hub: staged in a folder, checked there, then sent. Imports no torch."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from config import Config, ConfigError, DataConfig, load_config, save_config, sources_of
from toolkit.adapter_config import read_adapter_config
from toolkit.hub import causes
from toolkit.local_paths import TOKENIZER_FILES, is_hub_id
from toolkit.plain_values import PlainLoader
from toolkit.regular_files import not_regular
from toolkit.runs import CONFIG, METRICS, WEIGHTS, is_run, read_run
from toolkit.startup import redact

CARD, SETTINGS = "README.md", "adapter_config.json"
NEEDED = (SETTINGS, WEIGHTS, CARD, CONFIG)
TEXTS = {".md", ".json", ".jsonl", ".yaml", ".jinja", ".txt"}
# What else goes along: what reads the adapter's prompts and ends its answers, and how it was trained.
ALONG = [*TOKENIZER_FILES[:-1], "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
ALONG += ["chat_template.jinja", "generation_config.json", "training_curves.png", METRICS]

# ------------------------------------------------------------------------------------------------ the folder


def stage(folder: Path, staged: Path, base: str | None) -> list[str]:
    """Write what is to be uploaded of a run into an empty folder, and return the names of its files.

    base: the hub id of the base; None: the one that the run names. Paths of this machine are replaced by the names of
    what they lead to. Raise ConfigError for a folder without a finished run, or one that is not to be shared as it is.
    """
    if not is_run(str(folder)):
        raise ConfigError(f"--push: no run in {folder}: expected the folder of a finished run; --output_dir names it")
    state = read_run(folder)
    if state.problem or not (folder / WEIGHTS).is_file() or state.state.startswith(("running", "resumable")):
        raise ConfigError(
            f"--push: expected a finished run in {folder}, got one that is: {state.problem or state.state}"
        )
    for name in NEEDED:
        if problem := not_regular(folder / name) if (folder / name).exists() else "missing":
            raise ConfigError(f"--push: expected a finished run in {folder}, whose {name} is {problem}")
    config = load_config(folder / CONFIG)
    recorded = read_adapter_config(folder).get("base_model_name_or_path", config.model.name)  # refuses what is damaged
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    base = base or recorded
    if not is_hub_id(base) or os.path.exists(base):
        raise ConfigError(
            f"model.name: expected the hub id of the base, which others can load, got {base}; give it as --model_name"
        )
    replaced = local_names(config, recorded, folder, base)
    for path in sorted(found for pattern in (*NEEDED, *ALONG) for found in folder.glob(pattern)):
        if not not_regular(path) and not path.is_symlink():
            shutil.copyfile(path, staged / path.name)
    settings["base_model_name_or_path"] = base
    (staged / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    card = (folder / CARD).read_text(encoding="utf-8")
    for path_text, name in replaced.items():
        card = card.replace(path_text, name)
    (staged / CARD).write_text(card, encoding="utf-8")
    save_config(shared_config(config, base), staged / CONFIG)
    check_staged(staged, base, list(replaced))
    return sorted(path.name for path in staged.iterdir())


def local_names(config: Config, recorded: str, folder: Path, base: str) -> dict[str, str]:
    """Return what stands in the card for each path of this machine, the longest paths first."""
    found = {recorded: base, config.model.name: base} if recorded != base else {}
    paths = [source.dataset for source in sources_of(config.data)] + [config.lora.init_adapter or ""]
    paths += [config.training.output_dir, os.path.abspath(folder)]
    found |= {path: os.path.basename(os.path.normpath(path)) for path in paths if os.path.isabs(path)}
    return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))


def shared_config(config: Config, base: str) -> Config:
    """Return a run's configuration for others: without paths of this machine."""

    def name(path: Any) -> Any:
        return os.path.basename(os.path.normpath(path)) if isinstance(path, str) and os.path.isabs(path) else path

    def source(found: Any) -> Any:
        return found | {"dataset": name(found.get("dataset"))} if isinstance(found, dict) else name(found)

    dataset = config.data.dataset
    data: DataConfig = dataclasses.replace(
        config.data, dataset=source(dataset) if isinstance(dataset, str) else type(dataset)(map(source, dataset))
    )
    training = dataclasses.replace(config.training, output_dir=name(config.training.output_dir), resume="auto")
    lora = dataclasses.replace(config.lora, init_adapter=name(config.lora.init_adapter))
    model = dataclasses.replace(config.model, name=base)
    return dataclasses.replace(config, model=model, data=data, training=training, lora=lora)


def check_staged(staged: Path, base: str, local: list[str]) -> None:
    """Raise ConfigError unless the staged folder is an adapter that others can load, without secrets and local paths."""
    read_adapter_config(staged)
    load_config(staged / CONFIG)
    try:
        with safe_open(staged / WEIGHTS, framework="numpy") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--push: cannot read {WEIGHTS}: {' '.join(str(error).split())[:200]}") from None
    if not any(".lora_" in name for name in names):
        raise ConfigError(f"--push: expected an adapter's tensors in {WEIGHTS}, got {', '.join(names[:3]) or 'none'}")
    try:
        header = yaml.load((staged / CARD).read_text(encoding="utf-8").split("---")[1], PlainLoader)
        found_base = header["base_model"]
    except (yaml.YAMLError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"--push: cannot read the header of {CARD}: {' '.join(str(error).split())[:200]}") from None
    if found_base != base:
        raise ConfigError(f"--push: {CARD}: expected base_model: {base} in its header, got {found_base}")
    homes = [path for path in (*local, os.path.expanduser("~")) if os.path.isabs(path) and len(path) > 1]
    for path in sorted(staged.iterdir()):
        if path.suffix not in TEXTS:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if redact(text) != text:
            raise ConfigError(
                f"--push: {path.name} holds what looks like a secret; take it out of the run's folder first"
            )
        if found := [home for home in homes if home in text]:
            raise ConfigError(f"--push: {path.name} names a path of this machine, {found[0]}; take it out first")


# ------------------------------------------------------------------------------------------------ the upload


def check_name(name: str) -> None:
    """Raise ConfigError if a repository on the hub cannot have this name, or nothing is to be sent from here."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"--push: expected NAME or OWNER/NAME, got {name}: {' '.join(str(error).split())[:150]}"
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("--push: HF_HUB_OFFLINE is set, so nothing is sent; unset it")


def upload(staged: Path, name: str, private: bool, replace: bool) -> str:
    """Upload a staged folder, and return the repository's address; raise ConfigError.

    replace: it may exist already. Then it has to be as private as asked for, which create_repo does not change, and what
    another run has left there, such as a chat template, goes away.
    """
    api, made = HfApi(), ""
    old = [*NEEDED, *ALONG] if replace else None
    try:
        repo = str(api.create_repo(name, private=private, exist_ok=replace).repo_id)
        if replace and api.model_info(repo).private is not private:
            there, hint = ("public", "add --public") if private else ("private", "leave out --public")
            raise ConfigError(f"--push: {repo} is {there} on the hub; {hint} if that is meant, or choose another name")
        made = repo
        api.upload_folder(repo_id=made, folder_path=staged, commit_message="Upload a LoRA adapter", delete_patterns=old)
        return f"{constants.ENDPOINT}/{made}"
    except Exception as error:  # its HTTP library, whose errors these are, has changed more than once
        after = f" (the repository {made} is not complete: repeat the command with --overwrite)" if made else ""
        raise ConfigError(f"--push: {reason(error, name)}{after}") from None


def reason(error: Exception, name: str) -> str:
    """Return why an upload failed, in one line; raise the error itself if it has nothing to do with the hub."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        known = {
            401: "the hub does not accept the token: log in with `hf auth login`, or set HF_TOKEN",
            403: f"the token may not write to {name}: make one that may on {constants.ENDPOINT}/settings/tokens",
            409: f"{name} is taken: choose another name, or add --overwrite to replace its files",
        }
        return known.get(status, f"{constants.ENDPOINT} answers {status}: {' '.join(str(error).split())[:200]}")
    found = [cause for cause in causes(error) if isinstance(cause, OSError)]
    if not found:
        raise error
    return f"no connection to {constants.ENDPOINT} ({found[-1].strerror or type(found[-1]).__name__})"


def push(name: str, folder: Path, base: str | None, private: bool, replace: bool, say: Callable[[str], None]) -> int:
    """Upload a finished run's adapter under a name and return 0. Raise ConfigError if that cannot be done."""
    check_name(name)
    with tempfile.TemporaryDirectory(prefix="qlora-push-") as made:
        staged = Path(made)
        names = stage(folder, staged, base)
        size = sum(path.stat().st_size for path in staged.iterdir()) / 1e6
        if not get_token():
            raise ConfigError(
                "--push: no token: log in with `hf auth login`, or set HF_TOKEN to a token that may write"
            )
        say(f"uploading {len(names)} files, {size:,.1f} MB: {', '.join(names)}")
        address = upload(staged, name, private, replace)
    print(f"{'private' if private else 'public'}: {address}")
    return 0
