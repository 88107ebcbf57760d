"""Exported folders on the Hugging Face hub. What can be refused is refused before anything is written."""

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from megatron_lora.errors import UserError, first_line

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class HubUpload:
    """A repository that an export goes to. Raises UserError where it has no name that the hub takes, no token is there
    or the hub does not know it, or where the repository is public and that was not asked for."""

    def __init__(self, repository: str, *, public: bool = False):
        if not _REPOSITORY.fullmatch(repository):
            raise UserError(f"--push-to-hub {repository}: wanted OWNER/NAME")
        token = get_token()
        if token is None:
            raise UserError(
                f"--push-to-hub {repository} needs a token with the right to write: set HF_TOKEN, or run "
                "`hf auth login`"
            )
        self.repository, self.public = repository, public
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
        try:
            self._api.whoami()
            is_private = self._api.repo_info(repository).private
        except RepositoryNotFoundError:
            return
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
            raise UserError(f"--push-to-hub {repository}: the hub refuses: {first_line(error)}") from error
        if not (is_private or public):
            raise UserError(
                f"--push-to-hub {repository} exists and is public; say --public to put the export there, or name "
                "another"
            )

    def send(self, folder: Path) -> str:
        """Upload every file of the folder, into a private repository that is made where there is none; returns its
        address. Raises UserError where the hub does not take it."""
        try:
            url = self._api.create_repo(self.repository, private=not self.public, exist_ok=True)
            self._api.upload_folder(repo_id=self.repository, folder_path=folder, commit_message="Export")
        except (HfHubHTTPError, OSError) as error:
            raise UserError(
                f"{folder} is written, but --push-to-hub {self.repository} failed: {first_line(error)}; "
                f"`hf upload {self.repository} {folder}` tries again"
            ) from error
        return str(url)
