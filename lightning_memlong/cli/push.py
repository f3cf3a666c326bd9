"""An exported folder as a repository of the Hugging Face hub; what cannot be is told before anything is exported."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from lightning_memlong.config import require
from lightning_memlong.errors import UserError

OPTION = "push_to_hub"
LOG_IN = "log in (hf auth login), or set HF_TOKEN to a token with the right to write"


@contextmanager
def _told(repo_id: str, after: str = "") -> Iterator[None]:
    """Mistakes and faults of the hub in one line.

    Raises:
        UserError: For each.
    """
    key = f"{OPTION}={repo_id!r}"
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = error.server_message or f"status {status}"
        if status == 401:
            why, fix = "the token is not accepted", LOG_IN
        elif status in (403, 404):
            why, fix = f"the token may not write there ({said})", f"give a name under your own account, or {LOG_IN}"
        else:
            why, fix = f"the hub refuses it ({said})", "correct that, or try again later"
        raise UserError(f"{key}: {why}. Allowed: a repository you may write to. Fix: {fix}.{after}") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # offline, no route, a timeout; an odd answer
        why = " ".join(str(error).split()) or type(error).__name__
        allowed = f"a hub that answers at {HfApi().endpoint}"
        raise UserError(
            f"{key}: the hub cannot be reached ({why}). Allowed: {allowed}. Fix: check the network, and that "
            f"HF_HUB_OFFLINE is not set.{after}"
        ) from error


def check_push(repo_id: str | None, private: bool | None) -> None:
    """See that the hub answers, knows the token, and has or can have a repository of that name and kind.

    Args:
        repo_id: owner/name; None: nothing is pushed.
        private: Whether nobody else may see it; None: as the account has it.

    Raises:
        UserError: If not.
    """
    if repo_id is None:
        return require(private is None, "private", private, f"null without --{OPTION}", "give both, or neither")
    allowed = "owner/name, of letters, digits, '-', '_' and '.'"
    try:
        validate_repo_id(repo_id)
        ok = repo_id.count("/") == 1
    except HFValidationError:
        ok = False
    require(ok, OPTION, repo_id, allowed, "correct it")
    if get_token() is None:
        raise UserError(f"{OPTION}={repo_id!r}: there is no token. Allowed: a token that may write. Fix: {LOG_IN}.")
    with _told(repo_id):
        api = HfApi()
        account = api.whoami()
        owners = [account["name"], *(one["name"] for one in account.get("orgs", []))]
        try:
            public = private is True and not api.model_info(repo_id).private
        except RepositoryNotFoundError:
            public = False
    ok = repo_id.partition("/")[0] in owners
    require(ok, OPTION, repo_id, f"the accounts of the token, {', '.join(owners)}", "give a name under one of them")
    require(not public, "private", private, f"false: {repo_id} is there, and public", "choose another name")


def push(folder: Path, repo_id: str, private: bool | None) -> str:
    """Make the repository, unless it is there, and upload a folder.

    Args:
        folder: What to upload.
        repo_id: owner/name.
        private: As for :func:`check_push`.

    Returns:
        Its address.

    Raises:
        UserError: If that is not possible; the folder stays.
    """
    again = f" The folder {folder} is whole; upload it with: hf upload {repo_id} {folder}"
    with _told(repo_id, again):
        api = HfApi()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Export of lightning-memlong")
    return str(url)
