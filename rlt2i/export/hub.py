"""An export onto the hub: private unless asked otherwise."""

from __future__ import annotations

from pathlib import Path

from rlt2i.config.secrets import redacted_text


def check_repository(repository: str) -> None:
    """Refuse a text that is no name of a repository, before anything is written.

    Raises:
        ValueError: with the form that is asked for.
    """
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(f"export --push {repository}: write OWNER/NAME.")


def push(folder: Path, repository: str, *, public: bool = False) -> str:
    """Upload a folder to a model repository of the hub, which is made if it is not there.

    Args:
        repository: "owner/name".
        public: whether a new repository may be seen by everybody.

    Returns:
        Its address.

    Raises:
        ValueError: when the name is none, nobody is logged in, or the hub cannot be reached; the export stays.
    """
    check_repository(repository)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    later = f"The export is complete in {folder}; push it later with: hf upload {repository} {folder}"
    api = HfApi()
    try:
        api.create_repo(repository, repo_type="model", private=not public, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, repo_type="model", commit_message="Export of rlt2i")
    except LocalTokenNotFoundError as error:
        raise ValueError(f"export --push {repository}: not logged in; run `hf auth login` first. {later}") from error
    except OfflineModeIsEnabled as error:
        raise ValueError(f"export --push {repository}: HF_HUB_OFFLINE is set. {later}") from error
    except (HfHubHTTPError, OSError) as error:
        why = redacted_text((str(error).strip() or type(error).__name__).splitlines()[0])
        raise ValueError(f"export --push {repository}: the hub did not take it ({why}). {later}") from error
    return f"https://huggingface.co/{repository}"
