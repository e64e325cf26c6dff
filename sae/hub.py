"""The Hugging Face Hub: the folder of one SAE from it or onto it.

A download takes the weights and configs of one SAE's folder, never the repository, which may hold hundreds; a file
whose name leads out of the folder is not in it. All are of one commit, and the cache's ref to it is written last, so
that what is read without the Hub is whole. huggingface_hub's snapshot_download does neither: it lists the whole
repository, and waits without limit for a Hub that is silent. Here that is one line after some seconds, or the copy in
the cache.
A push is one commit, or none.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import posixpath
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sae.errors import UserError, nearest

logger = logging.getLogger("sae")
PATIENCE = 5.0
"""Seconds for the Hub to answer."""
CARD = "README.md"
MARK = "<!-- goldengate-sae wrote this card. Without this line it is never overwritten. -->"
_SAFE, _PICKLES = (".safetensors", ".npz"), (".pt",)
_ONE_A_FOLDER = ("sae_weights.safetensors", "sae.safetensors")
"""Files of weights whose folder is meant: statistics may lie beside them."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
Answer = TypeVar("Answer")


# ---- asking ----


def ask(request: Callable[[], Answer]) -> tuple[Answer | None, str]:
    """(what the Hub answers, "") or (None, why it is silent); a refusal is raised as huggingface_hub does.

    request   makes one request, with PATIENCE for its timeout
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  of its client: httpx or httpx2, by its version
        LocalTokenNotFoundError,
    )

    if constants.HF_HUB_OFFLINE:
        return None, "HF_HUB_OFFLINE is set: the Hugging Face Hub is offline"
    silent = "the Hugging Face Hub does not answer"
    try:
        return request(), ""
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500 or status in (408, 429):
            return None, f"{silent}: status {status}"
        raise
    except LocalTokenNotFoundError as error:
        raise UserError("a token is asked for (token=True), and none is here. Log in first (hf auth login).") from error
    except (HTTPError, OSError) as error:
        return None, f"{silent}: {error or type(error).__name__}"


@contextlib.contextmanager
def _told(repo: str, revision: str | None, here: str = "") -> Iterator[None]:
    """What the Hub refuses, and what breaks off, as one line.

    here   said first where the name may have been meant for something of this machine
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    login = "log in (hf auth login) or give a token"
    try:
        yield
    except GatedRepoError as error:
        raise UserError(f"{repo}: is gated. Ask for access on its page, then {login}.") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{repo}: {here}no repository of the Hub, or one without access. Check the name; else {login}."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repo}: has no revision '{revision}'. Give a branch, a tag or a commit of it.") from error
    except HFValidationError as error:
        raise UserError(f"{repo}: {here}no name of a repository (user/repo). Check it.") from error
    except (HTTPError, OSError, ValueError) as error:
        cause = error.__cause__ or error  # of a download, hf_hub_download says only that it failed
        if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
            cause = error
        if isinstance(cause, HfHubHTTPError):
            raise UserError(f"{repo}: {_refusal(cause)}") from error
        reason = _line(str(cause)) or type(cause).__name__
        raise UserError(f"{repo}: broke off ({reason}). Nothing is left half-written; try again.") from error
    except (KeyError, TypeError, AttributeError) as error:  # huggingface_hub takes an answer for what it should be
        reason = f"{type(error).__name__}: {_line(str(error))}"
        raise UserError(f"{repo}: the Hub's answer is not understood ({reason}). Check HF_ENDPOINT.") from error


def _refusal(error: Any) -> str:
    status, said = error.response.status_code, _line(error.server_message or "")
    match status:
        case 401 | 403:
            todo = "Check the token and its rights."
        case 404 | 410:
            todo = "Check that the file is there."
        case 451:
            todo = "It may not be given here; choose another SAE."
        case _:
            todo = "Try again later, or check HF_ENDPOINT."
    return f"the Hub refuses (status {status}{f': {said}' if said else ''}). {todo}"


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


# ---- from the Hub ----


def fetch(
    x: str,
    sae_id: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> tuple[Path, str]:
    """(local folder of an SAE, what it is called: "user/repo/folder").

    sae_id   the folder in the repository, or a file of weights; None for an SAE at its top
    A Hub that does not answer gives the copy in the cache, with a notice. Raises UserError where there is none, for a
    repository or revision that is not there, a gated one, and a folder without weights.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download

    folder = inner(sae_id) if sae_id else ""
    where = f"{x}/{folder}" if folder else x
    get = functools.partial(hf_hub_download, x, token=token, cache_dir=cache_dir, etag_timeout=PATIENCE)
    with _told(x, revision, "no folder here, and "):
        info, silent = None, "only local files are asked for"
        if not local_files_only:
            info, silent = ask(lambda: HfApi(token=token).model_info(x, revision=revision, timeout=PATIENCE))
        if info is not None:
            names = [one.rfilename for one in info.siblings or ()]
            wanted = _files_of(names, folder)
            if not wanted:
                raise _unknown(x, folder, names)
            if not _COMMIT.fullmatch(str(info.sha)):  # a folder of the cache is called after it
                raise UserError(f"{x}: the Hub names no commit ({info.sha!r:.60}). Try again.")
            paths = [Path(get(name, revision=info.sha, force_download=force_download)) for name in wanted]
            get(wanted[0], revision=revision or constants.DEFAULT_REVISION)  # has the cache note the commit
            return paths[0].parents[wanted[0].count("/")] / folder, where
        path = _cached(x, folder, revision, cache_dir)
    if path is None:
        raise UserError(f"{where}: {silent}, and its cache has no copy. Give a folder of this machine, or try later.")
    if not (local_files_only or constants.HF_HUB_OFFLINE):
        logger.warning("%s: %s; the copy in its cache is taken", where, silent)
    return path, where


def inner(name: str) -> str:
    """A folder's name in a repository, without slashes around it. Raises UserError for one that leads out."""
    parts = name.strip("/").split("/")
    if any(part in ("", ".", "..") or len(part) > 255 for part in parts) or "\\" in name or "\0" in name:
        raise UserError(f"{name!r:.80}: is no folder in a repository. Write its parts with / between them.")
    return "/".join(parts)


def _cached(x: str, folder: str, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    """The folder in the cache, by the commit that it last had there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(x, revision=revision, cache_dir=cache_dir, local_files_only=True)
    except LocalEntryNotFoundError as error:  # its path where the rest of the repository is what it misses
        found = getattr(error, "snapshot_path", None)
    path = Path(found) / folder if found else None
    return path if path is not None and path.exists() else None


def _files_of(names: Sequence[str], folder: str) -> list[str]:
    """The files of an SAE's folder, or of a file of weights: weights, configs, and the config of the run above it.

    Pickles only where nothing safer is there. Nothing without weights.
    """
    known = set(names)
    home = posixpath.dirname(folder) if folder in known else folder
    inside = [name for name in names if posixpath.dirname(name) == home]
    if folder in known and posixpath.basename(folder) not in _ONE_A_FOLDER:
        weights = [folder]
    else:
        inside.append(posixpath.join(home, "checkpoints", "final.safetensors"))  # of Llama Scope
        weights = [name for name in inside if name in known and name.endswith(_SAFE)]
        weights = weights or [name for name in inside if name.endswith(_PICKLES)]
    if not weights:
        return []
    above = posixpath.dirname(home)  # of sparsify's hook points; it may lie above a folder for each seed too
    runs = dict.fromkeys((above, posixpath.dirname(above)) if home else ())
    inside += [posixpath.join(run, name) for run in runs for name in ("config.json", "hyperparams.json")]
    return weights + [name for name in inside if name in known and name.endswith(".json")]


def _unknown(x: str, folder: str, names: Iterable[str]) -> UserError:
    weights = [name for name in names if name.endswith((*_SAFE, *_PICKLES))]
    known = sorted({posixpath.dirname(name).removesuffix("/checkpoints") for name in weights} - {""}) or sorted(weights)
    if not known:
        return UserError(f"{x}: holds no weights of an SAE. Give another repository.")
    what = f"has no SAE {folder!r}{nearest(folder, known) or '.'}" if folder else "has no SAE at its top."
    closer = [name for name in known if name.startswith(f"{folder}/")] or known
    return UserError(f"{x}: {what} Give one of its {len(closer):,} as sae_id, such as {', '.join(closer[:3])}.")


# ---- onto the Hub ----


def push(
    folder: Path,
    repo: str,
    path_in_repo: str | None = None,
    *,
    replaces: Iterable[str] = (),
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool = False,
    commit_message: str | None = None,
) -> str:
    """Upload the files of a folder as one commit, or none; the address of what is there then.

    replaces   names of files that leave the repository's folder where `folder` has none of that name
    A card (README.md) without MARK is somebody's own text and stays. The repository is made where it is missing, and
    the branch `revision`. Raises UserError for what the Hub refuses, and where it does not answer.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    inside = inner(path_in_repo) if path_in_repo else ""
    api = HfApi(token=token)
    with _told(repo, revision):
        try:
            _, silent = ask(lambda: api.model_info(repo, timeout=PATIENCE))
            if silent:
                raise UserError(f"{repo}: {silent}. Nothing was pushed; try later.")
        except RepositoryNotFoundError as error:
            if isinstance(error, GatedRepoError):
                raise
            api.create_repo(repo, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        info = api.model_info(repo, revision=revision, timeout=PATIENCE)
        there = {one.rfilename for one in info.siblings or ()}
        given = {posixpath.join(inside, file.name): file for file in sorted(folder.iterdir())}
        card = posixpath.join(inside, CARD)
        if card in given and card in there:
            with tempfile.TemporaryDirectory() as cache:
                old = Path(hf_hub_download(repo, card, revision=info.sha, token=token, cache_dir=cache))
                ours = MARK in old.read_text(encoding="utf-8", errors="replace")
            if not ours:
                logger.warning("%s/%s: is not ours and stays as it is", repo, card)
                del given[card]
        stale = {posixpath.join(inside, name) for name in replaces} & there - given.keys()
        api.create_commit(
            repo,
            [*(CommitOperationAdd(name, file) for name, file in given.items()),
             *(CommitOperationDelete(name) for name in sorted(stale))],
            commit_message=commit_message or f"SAE {inside}".strip(),
            revision=revision,
            parent_commit=info.sha,
        )  # fmt: skip
    below = ["tree", revision or constants.DEFAULT_REVISION, inside] if inside or revision else []
    return "/".join([constants.ENDPOINT, repo, *below]).rstrip("/")
