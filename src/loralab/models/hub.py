"""Is this id on the Hugging Face hub, in the cache, or nowhere? Answered in seconds."""

from typing import Literal

from loralab.errors import UserError

SECONDS = 5.0


def locate(repo: str, kind: Literal["model", "dataset"]) -> bool:
    """Return whether only the local cache can be used for this repository.

    The hub's own clients retry an unreachable host for half a minute; one request with a short
    time limit tells first whether that would help.

    Args:
        repo: a hub id such as "org/name".

    Raises:
        UserError: not a hub id, no such repository, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        if kind == "model" and isinstance(try_to_load_from_cache(repo, "config.json"), str):
            return True
        HfApi().repo_info(repo, repo_type=kind, timeout=SECONDS)
    except HFValidationError:
        raise UserError(f"there is no folder {repo!r}, and it is not the id of a {kind}") from None
    except OfflineModeIsEnabled:
        if kind == "dataset":  # `datasets` keeps a cache of its own and looks there at once
            return True
        raise UserError(
            f"the {kind} {repo!r} is no local folder and not in the cache, and offline mode is on"
        ) from None
    except GatedRepoError:
        raise UserError(
            f"the {kind} {repo!r} is gated: accept its terms on the hub and log in first"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"there is no folder {repo!r} and no {kind} of that name on the hub "
            "(or it is private: log in first)"
        ) from None
    except Exception as error:  # every transport error: the HTTP library behind the hub changes
        raise UserError(
            f"there is no folder {repo!r}, and the hub cannot be reached to look for a {kind} "
            f"of that name ({type(error).__name__})"
        ) from None
    return False
