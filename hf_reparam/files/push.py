"""A converted model's folder, uploaded whole: what `hf-reparam push` does, for use from Python."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_reparam.errors import CheckpointError, TargetError
from hf_reparam.files.folder import card_of, checked, model_place, skeleton
from hf_reparam.files.out import visible_files
from hf_reparam.model.card import prepare_upload
from hf_reparam.model.config import ReparamConfigMixin
from hf_reparam.model.remote import FILE


@dataclass(frozen=True)
class Pushed:
    """What was uploaded."""

    repo: str  # Hub id
    url: str  # of the commit
    files: tuple[str, ...]  # names in the repository

    def to_dict(self) -> dict[str, Any]:
        """Plain strings, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{len(self.files)} files pushed to {self.repo}: {self.url}"


def push_folder(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload model",
    create_pr: bool = False,
) -> Pushed:
    """Upload the folder of a converted model in one commit: weights, tokenizer and whatever else it holds.

    Its card is the folder's README.md, or else the one that the repository has, with this package's section written
    anew. No weight is loaded, and the folder is not changed.

    Args:
        folder: as `save_pretrained` or `convert_folder` wrote it.
        repo: Hub id; made where it is not there.
        private, revision, token, commit_message, create_pr: as for `push_to_hub`.

    Raises:
        CheckpointError: no such folder, or the Hub cannot be reached or refuses.
        TargetError: the model in the folder is not a converted one.
    """
    source = Path(folder)
    if not source.is_dir():
        raise CheckpointError(f"no such folder: {folder}")
    place = model_place(source)
    model = skeleton(str(place))
    if not isinstance(model.config, ReparamConfigMixin):
        raise TargetError(f"{folder} holds a {type(model).__name__}, which is not converted: push it by other means")
    card = card_of(source, strict=True) if (source / "README.md").is_file() else None
    with checked(f"{folder} cannot be pushed to {repo}"):
        files = visible_files(source)
        send = prepare_upload(
            model,
            source,
            repo,
            card=card,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            remote_code=(place / FILE).is_file(),
        )
        done = send([source / name for name in files])
    names = sorted({*(name.as_posix() for name in files), "README.md"})
    return Pushed(repo, str(getattr(done, "commit_url", done)), tuple(names))
