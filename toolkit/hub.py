"""The Hugging Face hub and its cache: asked before the libraries do, and their errors as one line of ours.

It imports no torch, and nothing of the project but config and toolkit.local_paths.
"""

import contextlib
import difflib
import errno
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from config import ConfigError
from toolkit.local_paths import is_hub_id


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, then the error that caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def cache_problem(error: BaseException) -> ConfigError | None:
    """Return the error about a Hugging Face cache that cannot be written, or None if `error` has another reason."""
    folders = {"HF_HOME": constants.HF_HOME, "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    folders["HF_DATASETS_CACHE"] = os.environ.get("HF_DATASETS_CACHE", os.path.join(constants.HF_HOME, "datasets"))
    for cause in causes(error):
        if not isinstance(cause, OSError) or cause.errno not in UNWRITABLE:
            continue
        place = os.path.abspath(os.fsdecode(cause.filename or constants.HF_HOME))
        for name, folder in sorted(folders.items(), key=lambda item: -len(item[1])):  # the innermost folder first
            folder = os.path.abspath(os.path.expanduser(folder))
            if cause.errno == errno.ENOENT and not folder.startswith(place + os.sep):
                continue  # a file that is missing in the cache, and not a folder that cannot be made
            # makedirs names the first folder that it cannot create, which may be one above the cache.
            if os.path.commonpath([place, folder]) in (place, folder):
                name = name if name in os.environ else "HF_HOME"
                return ConfigError(
                    f"{name}: cannot write in {folder}: {cause.strerror}; set {name} to a folder that you can write"
                )
    return None


def hub_problem(setting: str, name: str, error: BaseException) -> ConfigError | None:
    """Return the error about a name that the hub cannot deliver, or None if `error` has another reason.

    It may be gated, missing, without this revision, or the hub cannot be reached.
    setting: model.name or data.dataset; `name` is its value.
    """
    kind, path = ("data set", "datasets/") if setting == "data.dataset" else ("model", "")
    if type(error).__name__ == "DatasetNotFoundError":  # datasets hides the cause: repeat the request
        try:
            get_hf_file_metadata(hf_hub_url(name, "README.md", repo_type="dataset"), timeout=10)
        except (OSError, ValueError) as reason:
            error = reason if isinstance(reason, HfHubHTTPError) else error
    found = list(causes(error))

    def first(*types: type[BaseException]) -> Any:
        return next((cause for cause in found if isinstance(cause, types)), None)

    if first(GatedRepoError):
        page = f"{constants.ENDPOINT}/{path}{name}"
        return ConfigError(
            f"{setting}: {name} is gated on the hub: ask for access on {page}, then log in with `hf auth login` or set "
            "HF_TOKEN to a token of that account"
        )
    if revision := first(RevisionNotFoundError):
        found_in_url = re.search(r"/resolve/([^/]+)/", str(revision.response.url))
        asked = f" {unquote(found_in_url[1])!r}" if found_in_url else ""
        return ConfigError(f"model.revision: the hub has {name}, but no branch, tag or commit{asked} of it")
    if first(RepositoryNotFoundError) or type(error).__name__ == "DatasetNotFoundError":
        return ConfigError(
            f"{setting}: the hub has no {kind} {name}, or it is private{_folder_here(name)}: check the spelling "
            "(owner/name); for a private one log in with `hf auth login` or set HF_TOKEN"
        )
    answer, entry = first(HfHubHTTPError), first(EntryNotFoundError)
    unreachable = first(ConnectionError, TimeoutError, LocalEntryNotFoundError)
    if entry and not unreachable:
        return ConfigError(f"{setting}: a file is missing in {name} on the hub: {' '.join(str(entry).split())[:200]}")
    if not (answer or unreachable):
        return None
    why = f"no connection to {constants.ENDPOINT} ({getattr(found[-1], 'strerror', '') or type(found[-1]).__name__})"
    if answer:
        why = f"{constants.ENDPOINT} answers {answer.response.status_code} {answer.response.reason_phrase}"
    if constants.HF_HUB_OFFLINE:
        why = f"HF_HUB_OFFLINE is set and the cache in {constants.HF_HOME} does not have it"
    local = "a local file or folder" if path else "a local folder"
    return ConfigError(
        f"{setting}: cannot get {name} from the hub: {why}{_folder_here(name)}; give {local}, point HF_HOME at a cache that has it, or try "
        "--config tiny/config.yaml"
    )


def _folder_here(name: str) -> str:
    """Return, for a name such as models/qwn where there is a folder models, that the folder has no qwn; else an empty text."""
    folder, _, child = name.partition("/")
    if not (child and os.path.isdir(folder)):
        return ""
    near = difflib.get_close_matches(child, os.listdir(folder), n=1, cutoff=0.5)
    has = f"has {near[0]}, but no {child}" if near else f"has no {child}"
    return f", and the folder {folder} here {has}"


def check_connection(name: str, kind: str) -> None:
    """Raise ConnectionError if the hub answers nothing at all within two tries. kind: model or dataset.

    huggingface_hub itself tries for half a minute. A name of which a cache holds something is not asked for, since it
    may load without the hub.
    """
    rows = os.environ.get("HF_DATASETS_CACHE", os.path.join(constants.HF_HOME, "datasets"))
    caches = [Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")]
    caches += Path(rows).glob(name.partition("/")[0] + "*") if kind == "dataset" else []  # it changes what follows
    for again in (False, True):
        try:
            if not any(map(os.path.exists, caches)):
                url = hf_hub_url(name, "README.md", repo_type=kind)
                get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return
        except Exception as error:  # its HTTP library, whose errors these are, has changed more than once
            if isinstance(error, HfHubHTTPError) or not any(isinstance(cause, OSError) for cause in causes(error)):
                return  # an answer, or a name that the hub cannot have: the caller's own request says which
            if again:
                raise ConnectionError(f"no connection to {constants.ENDPOINT}") from error
        time.sleep(1)


@contextlib.contextmanager
def asking_hub(name: str, kind: str = "model", patience: float = 3.0) -> Iterator[None]:
    """Raise ConnectionError if the hub is needed for `name` and cannot be reached; see check_connection.

    Say on stderr that the hub is being asked if that takes longer than `patience` seconds.
    """
    line = f"still waiting for {constants.ENDPOINT} ({name})"
    asked = is_hub_id(name) and not os.path.exists(name) and not constants.HF_HUB_OFFLINE
    timer = threading.Timer(patience, print, [line], {"file": sys.stderr})
    timer.daemon = True
    if asked and os.environ.get("LOCAL_RANK", "0") == "0":
        timer.start()
    try:
        if asked:
            check_connection(name, kind)
        yield
    finally:
        timer.cancel()


UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC, errno.ENOENT}
