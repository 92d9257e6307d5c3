"""One commit to the Hub: what a save has written, and the model card."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

from hf_reparam.model.card import add_tags, model_card, published_card

__all__ = ["Upload", "written"]


@dataclass(frozen=True)
class Upload:
    """A repository that is there, with the card that it will have: all that can fail before the long work has not.

    Args:
        api: how to reach the Hub.
        repo_id: the repository.
        card: what `README.md` will be.
        commit: message, description, revision and whether to open a pull request.
    """

    api: HfApi
    repo_id: str
    card: ModelCard
    commit: dict[str, Any]

    @classmethod
    def prepare(
        cls,
        model: Any,
        repo_id: str,
        *,
        commit_message: str = "Upload model",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Collection[str] = (),
    ) -> "Upload":
        """Make the repository where it is not there, and the card, from the one that it has."""
        api = HfApi(token=token, library_name="hf_reparam")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        card = model_card(model, card=published_card(repo_id, token))
        add_tags(card, [*(model.model_tags or ()), *tags])
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = {"commit_message": commit_message, "commit_description": commit_description}
        return cls(api, repo_id, card, {**commit, "revision": revision, "create_pr": create_pr})

    def send(self, folder: Path, before: dict[Path, int]) -> Any:
        """Commit what was written into a folder since `before`, and the card."""
        self.card.save(folder / "README.md")
        changed = sorted(path for path, time in written(folder).items() if before.get(path) != time)
        files = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in changed]
        return self.api.create_commit(self.repo_id, files, **self.commit)


def written(folder: Path) -> dict[Path, int]:
    """When every file of a folder was written, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
