"""Which head reads which features, and every setting of a head: for the command line and for docs/heads/index.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vla.heads.data import DataConfig
from vla.heads.needs import Need
from vla.heads.registry import HEADS, SUMMARIES, head_class
from vla.stores.described import FieldDoc, describe_fields
from vla.stores.settings import Settings
from vla.training.config import TrainConfig

ANY = "any feature, the state, the task"
"""What heads without needs read: whatever the stores hold."""


def requirements(name: str) -> tuple[Need, ...]:
    """Return what a head of default settings needs of the stores; () where it reads whatever there is."""
    cls = head_class(name)
    return cls.needs(cls.Config())


def head_fields(name: str) -> tuple[FieldDoc, ...]:
    """Return every setting of a head, `model.*`, and those of `train.*` that it has other defaults for."""
    cls = head_class(name)
    own = cls.train_defaults
    train = (field for field in describe_fields(TrainConfig, "train.", own) if field.name.partition(".")[2] in own)
    return (*describe_fields(cls.Config, "model."), *train)


def undocumented(name: str) -> list[str]:
    """Return the settings of a head's Config, of DataConfig and of TrainConfig whose docstrings do not name them."""
    classes: dict[str, type[Settings]] = {"model.": head_class(name).Config, "data.": DataConfig, "train.": TrainConfig}
    return [f.name for prefix, cls in classes.items() for f in describe_fields(cls, prefix) if not f.text]


def table() -> list[dict[str, Any]]:
    """Return one row a head: `head`, `summary`, `needs` (texts), `commands` that make what it needs."""
    rows = []
    for name in HEADS:
        needs = requirements(name)
        rows.append(
            {
                "head": name,
                "summary": SUMMARIES[name],
                "needs": [need.describe() for need in needs] or [ANY],
                "commands": list(dict.fromkeys(need.command() for need in needs)),
            }
        )
    return rows


def markdown() -> Iterator[str]:
    """Yield the lines of the table in docs/heads/index.md."""
    yield "| head | what | features it needs | made by |"
    yield "|---|---|---|---|"
    for row in table():
        commands = "<br>".join(f"`{command}`" for command in row["commands"]) or "any backbone"
        yield f"| `{row['head']}` | {row['summary']} | {'; '.join(row['needs'])} | {commands} |"
