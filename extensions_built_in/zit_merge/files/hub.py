"""LoRAs on the Hugging Face hub: hf:user/repo/path/file.safetensors[@revision], or hf:user/repo[@revision] with one file in it.

Names are read here without huggingface_hub, which is heavy and loaded only when a cache or the hub itself is asked.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import SettingError, ZitMergeError
from .paths import NO_PICKLES, PICKLES

HUB_PREFIX = "hf:"
_ENDING = ".safetensors"
_MAIN = "main"  # huggingface_hub.constants.DEFAULT_REVISION
# The file ends at the first .safetensors that is the last thing or has an @ behind it: both names may hold an @ themselves.
_SOURCE = re.compile(rf"{HUB_PREFIX}(?P<repo>[^/@]+/[^/@]+)/(?P<file>.+?(?i:\.safetensors))(?:@(?P<revision>.*))?")
_ONLY_FILE = re.compile(rf"{HUB_PREFIX}(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>.*))?")
_PICKLE = re.compile(rf"(?i:{'|'.join(map(re.escape, PICKLES))})(@.*)?$")
_REPO_PART = re.compile(r"\w([\w.-]*\w)?", re.ASCII)  # huggingface_hub.utils._validators.REPO_ID_REGEX, and its limit of 96
_SHOWN = 8  # names in an error
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFile:
    """A file on the hub.

    Attributes:
        repo: user/repo.
        file: Its path in the repository; empty is the only .safetensors file at the top of it.
        revision: Branch, tag or commit; None is the main branch.
    """

    repo: str
    file: str
    revision: str | None = None

    def __str__(self) -> str:
        path = f"{self.repo}/{self.file}" if self.file else self.repo
        return f"{HUB_PREFIX}{path}" + (f"@{self.revision}" if self.revision else "")

    @property
    def name(self) -> str:
        """What the file is called, or its repository where the source does not name it. A cached path that is resolved loses it:
        there files are named by their hash."""
        return (self.file or self.repo).rpartition("/")[2]

    def at(self, path: Path) -> HubFile:
        """This very version of the file.

        Args:
            path: Of the file in the cache, as `cached` and `download` return it.

        Raises:
            ZitMergeError: It is not a path of the cache, or one that was resolved.
        """
        return HubFile(self.repo, self.file or path.name, commit_of(path))


# What this process was given: a plan and its merge, or two steps, must not see two versions because a branch moved between them.
_pins: dict[HubFile, str] = {}


def parse(source: str) -> HubFile:
    """Reads a source.

    Args:
        source: hf:user/repo/path/file.safetensors[@revision], or hf:user/repo[@revision].

    Raises:
        SettingError: It has another form.
    """
    match = _SOURCE.fullmatch(source)
    if match and _is_repo(match["repo"]) and _is_path(match["file"], ":") and _is_revision(match["revision"]):
        return HubFile(match["repo"], match["file"], match["revision"])
    only = _ONLY_FILE.fullmatch(source)
    is_file = only and any(part.lower().endswith((_ENDING, *PICKLES)) for part in (only["repo"], source))  # a part is forgotten
    if only and not is_file and _is_repo(only["repo"]) and _is_revision(only["revision"]):
        return HubFile(only["repo"], "", only["revision"])
    shown = repr(source[:120])
    if not match and _PICKLE.search(source):
        raise SettingError(f"{shown} {NO_PICKLES}")
    raise SettingError(
        f"{shown} does not name a file on the Hugging Face hub: write hf:user/repo/file.safetensors, "
        "and @revision behind it where it is not the main branch; hf:user/repo does where it holds only one such file"
    )


def _is_repo(name: str) -> bool:
    parts = name.split("/")
    well_formed = all(_REPO_PART.fullmatch(part) and len(part) <= 96 for part in parts)
    return well_formed and not re.search(r"--|\.\.|\.git$", name)


def _is_path(text: str, forbidden: str) -> bool:
    """Whether it can stand in a URL and, part by part, below the cache's folders, and nowhere else."""
    if not text.isprintable() or set(text) & {"\\", *forbidden}:
        return False
    return all(part not in ("", ".", "..") for part in text.split("/"))


def _is_revision(text: str | None) -> bool:
    return text is None or _is_path(text, " ~^:?*[")  # git check-ref-format


def cached(file: HubFile) -> Path | None:
    """The file in the local cache, if it is there; the network is never asked.

    Raises:
        SettingError: No file is named, and the cache holds several of the repository.
    """
    hub = _huggingface_hub()
    if not file.file:
        return _only_cached(file, hub)
    try:
        found = hub.try_to_load_from_cache(file.repo, file.file, revision=_pins.get(file, file.revision))
    except (OSError, ValueError):
        return None  # a cache that can't be read: download() says why
    return Path(found) if isinstance(found, str) else None  # not a str: known not to exist


def download(file: HubFile) -> Path:
    """The file in the local cache, fetched if it has to be; within one process always the same commit.

    Args:
        file: What to fetch. Private and gated repositories need HF_TOKEN or a stored login.

    Raises:
        SettingError: The hub does not have it or does not hand it out, can't be reached, or the disk has no room; no file is
            named, and the repository holds none or several.
    """
    hub = _huggingface_hub()
    name = file.file or _only_listed(file, hub)
    try:
        path = Path(hub.hf_hub_download(file.repo, name, revision=_pins.get(file, file.revision)))
    except Exception as e:  # HTTP clients and the Rust of Xet raise what no list holds
        raise SettingError(_reason(e, file, hub)) from e
    _pins[file] = commit_of(path)
    return path


def _only_listed(file: HubFile, hub: ModuleType) -> str:
    """The name of the only file of a repository, from its listing; from the cache while the hub is away."""
    errors = hub.errors
    try:
        found = hub.HfApi().model_info(file.repo, revision=_pins.get(file, file.revision))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as e:
        raise SettingError(_reason(e, file, hub)) from e
    except Exception as e:  # HTTP clients raise what no list holds
        if path := _only_cached(file, hub):
            return path.name
        raise SettingError(_reason_unreached(e, file, hub)) from e
    return _only([sibling.rfilename for sibling in found.siblings or ()], file, f"{hub.constants.ENDPOINT}/{file.repo}")


def _only_cached(file: HubFile, hub: ModuleType) -> Path | None:
    """The only file of a repository that the cache holds; None where it holds none."""
    try:
        folder = Path(
            hub.snapshot_download(
                file.repo, revision=_pins.get(file, file.revision), allow_patterns=[f"*{_ENDING}"], local_files_only=True
            )
        )
        names = [path.name for path in folder.iterdir() if path.is_file()]  # not a link to a blob that somebody deleted
    except (OSError, ValueError, hub.errors.LocalEntryNotFoundError):
        return None  # nothing, or a cache that can't be read: download() says why
    names = [name for name in names if name.lower().endswith(_ENDING)]
    return folder / _only(names, file, "the local cache") if names else None


def _only(paths: list[str], file: HubFile, where: str) -> str:
    """The one .safetensors among the paths that lies at the top."""
    names = sorted(path for path in paths if path.lower().endswith(_ENDING) and "/" not in path)
    if len(names) == 1:
        return names[0]
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    held = f"holds {len(names)} at its top in {where} ({shown})" if names else f"holds none at its top ({where})"
    example = HubFile(file.repo, names[0] if names else "folder/file.safetensors", file.revision)
    raise SettingError(f"{file} names no {_ENDING} file, and the repository {held}: name the file, as in {example}")


def model_folder(name: str, *, may_download: bool) -> Path | None:
    """A repository's transformer in the local cache, fetched if it has to be and may be.

    Args:
        name: user/repo[@revision] of a diffusers model.
        may_download: Whether the hub may be asked.

    Returns:
        The folder of the snapshot; None where it is not in the cache.

    Raises:
        SettingError: The name has another form; the hub does not have it or does not hand it out, or can't be reached.
    """
    repo, _, revision = name.partition("@")
    if not _is_repo(repo) or repo.count("/") != 1 or not _is_revision(revision or None):
        raise SettingError(f"{name[:120]!r} names no model on the Hugging Face hub: write user/repo, or give a path")
    file, hub = HubFile(repo, "transformer", revision or None), _huggingface_hub()
    try:
        found = Path(hub.snapshot_download(repo, revision=file.revision, allow_patterns=["transformer/*"], local_files_only=True))
        if _is_whole(found / "transformer"):
            return found
    except (OSError, ValueError, hub.errors.LocalEntryNotFoundError):
        pass
    if not may_download:
        return None
    try:
        return Path(hub.snapshot_download(repo, revision=file.revision, allow_patterns=["transformer/*"]))
    except Exception as e:  # HTTP clients and the Rust of Xet raise what no list holds
        raise SettingError(_reason(e, file, hub)) from e


def _is_whole(folder: Path) -> bool:
    """Whether a download came to its end: all files of the index are there, or the one file that needs none."""
    for index in folder.glob("*.safetensors.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        return all((folder / str(name)).is_file() for name in names)
    return any(folder.glob("*.safetensors"))


def commit_of(path: Path) -> str:
    """The commit of a file in the cache, from its path .../snapshots/<commit>/...

    Raises:
        ZitMergeError: It is not a path of the cache, or one that was resolved.
    """
    for folder, commit in pairwise(path.parts[:-1]):
        if folder == "snapshots" and _COMMIT.fullmatch(commit):
            return commit
    raise ZitMergeError(f"{path}: is not a snapshot in the cache of the Hugging Face hub: give hf:user/repo/file.safetensors")


def _huggingface_hub() -> ModuleType:
    try:
        import huggingface_hub.file_download  # all that is needed below; the package itself loads its parts late
    except ImportError as e:
        package = (e.name or "huggingface_hub").partition(".")[0]
        raise SettingError(f"the package {package}, which hf: sources need, does not load: pip install {package}") from e
    return huggingface_hub


def _reason(error: Exception, file: HubFile, hub: ModuleType) -> str:
    """Why a download failed and what to do, in one sentence; huggingface_hub's own messages have several lines."""
    errors, endpoint = hub.errors, hub.constants.ENDPOINT
    revision = file.revision or _MAIN
    if isinstance(error, errors.GatedRepoError):
        page = f"{endpoint}/{file.repo}"
        return f"{file.repo} is gated: accept its licence on {page}, then log in with hf auth login or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the hub has no repository {file.repo}, or it is private: check the name, "
            "and for a private one log in with hf auth login or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{file.repo} has no revision {revision}: give one of its branches, tags or commits"
    # huggingface_hub 1.23, AI-Toolkit's: without a connection it closes its client, then tries again with the closed one.
    closed = isinstance(error, RuntimeError) and "client has been closed" in str(error)
    if closed or isinstance(error, errors.LocalEntryNotFoundError):
        return _reason_unreached(error.__cause__, file, hub)
    if isinstance(error, errors.EntryNotFoundError):
        page = f"{endpoint}/{file.repo}/tree/{revision}"
        return f"{file.repo} has no file {file.file} in {revision}: check its path on {page}"
    if isinstance(error, errors.HfHubHTTPError):
        return _reason_refused(error, file)
    return _reason_broken(error, file, hub)


def _reason_unreached(cause: BaseException | None, file: HubFile, hub: ModuleType) -> str:
    """Why the hub could not be asked about a file that is not in the cache."""
    errors, endpoint = hub.errors, hub.constants.ENDPOINT
    if isinstance(cause, errors.OfflineModeIsEnabled):
        command = f"hf download {file.repo} {file.file}".rstrip()
        return f"{file} is not in the local cache, and HF_HUB_OFFLINE forbids fetching it: unset that, or first run {command}"
    if isinstance(cause, errors.HfHubHTTPError):
        return _reason_refused(cause, file)
    if isinstance(cause, errors.FileMetadataError):
        return f"{endpoint} does not answer as the hub does: check HF_ENDPOINT and the proxy"
    return f"{file} is not in the local cache, and {endpoint} can't be reached: check the network, or give the path of a file"


def _reason_refused(error: Any, file: HubFile) -> str:
    """What an answer of the hub means that is no 'not found'."""
    status = error.response.status_code
    if status == 401:
        return f"the hub does not accept the token for {file.repo}: log in again with hf auth login, or correct HF_TOKEN"
    if status == 403:
        return f"the hub refuses access to {file.repo}: use a token that may read it, unless its page says it is disabled"
    if status == 429:
        return f"the hub has had too many requests (429) and does not send {file}: wait some minutes and run again"
    return f"the hub does not send {file} now (HTTP status {status}): run again later"


def _reason_broken(error: Exception, file: HubFile, hub: ModuleType) -> str:
    """What went wrong while the file was on its way."""
    errors, endpoint = hub.errors, hub.constants.ENDPOINT
    if isinstance(error, (errors.HTTPError, ConnectionError)):
        return f"the connection to {endpoint} broke off ({type(error).__name__}): check the network and run again"
    if isinstance(error, OSError) and error.strerror:
        cache = hub.constants.HF_HUB_CACHE
        return f"{file} can't be stored in {cache} ({error.strerror}): make room there, or set HF_HUB_CACHE to another folder"
    kind = type(error).__name__
    return f"{file} could not be fetched ({kind}): run again, and if that does not help fetch it by hand and give its path"
