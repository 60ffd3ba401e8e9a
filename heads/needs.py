"""What a head needs of the stores, and what to type where it is not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vla.heads.batch import HeadIO
from vla.stores.errors import UsageError


@dataclass(frozen=True)
class Need:
    """One feature by name: its `layout` axes between view and channel, and the `backbone` that makes it.

    `masked`: it has to come with its mask, `<feature>_mask`. The feature "text" stands for a text store; `embeddings`
    says that ids alone are not enough.
    """

    feature: str
    backbone: str
    layout: tuple[str, ...] = ("token",)
    masked: bool = False
    embeddings: bool = False

    def lacking(self, io: HeadIO) -> str | None:
        """Return what is wrong with the stores for this need, or None."""
        if self.feature == "text":
            if io.text is None:
                return "no text store is among them"
            return "the text store has ids without embeddings" if self.embeddings and not io.text.width else None
        found = io.features.get(self.feature)
        if found is None:
            return f"they hold {', '.join(io.features) or 'no feature'}"
        if found.dims[:-1] != self.layout:
            return f"{self.feature!r} has the axes {found.dims}"
        return f"{self.feature!r} comes without its mask" if self.masked and not found.masked else None

    def describe(self) -> str:
        """Return the need in a few words, such as "`fine` (token, channel), with its mask"."""
        if self.feature == "text":
            return "text with embeddings" if self.embeddings else "text"
        axes = ", ".join((*self.layout, "channel"))
        return f"`{self.feature}` ({axes}){', with its mask' if self.masked else ''}"

    def command(self) -> str:
        """Return the command that makes it, but for its source."""
        return f"vla featurize --backbone {self.backbone}" + (
            " --set options.embedding=table" if self.embeddings else ""
        )


def check_needs(head: str, needs: Sequence[Need], io: HeadIO) -> None:
    """Raise `UsageError` naming the first need that the stores do not meet, and the command that would."""
    for need in needs:
        wrong = need.lacking(io)
        if wrong is not None:
            what = "a text store" if need.feature == "text" else f"the feature {need.feature!r}"
            raise UsageError(
                f"head {head!r} needs {what}, and the stores given do not fit: {wrong}",
                expected=f"a store of the backbone {need.backbone}",
                fix=f"{need.command()} on the same --source, then --store of it too",
            )
