"""What a hierarchical data set says of its tasks: `instruction_json`, and the order in which its texts count.

high_level_task: str                                     of all stages that name none of their own; may be missing
task_instructions: [{stage: 1.., subtask, high_level_task?, text?}]      one entry a stage, for folders stage<N>
tasks: {TASK: {text?, subtasks?: {SUBTASK: {text?}}}}                    for folders TASK/SUBTASK
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla.featurize.sources.files import read_json
from vla.stores.errors import SourceError


@dataclass(frozen=True)
class Said:
    """What holds for a run: `text` is the subtask in other words where the data set has them, else the subtask."""

    high_level_task: str
    subtask: str
    text: str

    def named(self) -> dict[str, str]:
        """Return the texts by name, as an `Episode` takes them."""
        return {"high_level_task": self.high_level_task, "subtask": self.subtask, "text": self.text}


@dataclass(frozen=True)
class StageTexts:
    """The content of an `instruction_json`, checked; `file` names it in errors, and is empty where there is none."""

    file: str = ""
    high_level_task: str | None = None
    stages: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    tasks: Mapping[str, tuple[str | None, Mapping[str, str]]] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> StageTexts:
        """Read and check the file. Raises `SourceError` naming the field that does not conform."""
        raw = _table(read_json(file, "instruction_json", "source_options.instruction_json=FILE"), str(file))
        stages: dict[int, Mapping[str, str]] = {}
        entries = raw.get("task_instructions", [])
        if not isinstance(entries, list):
            raise SourceError(f"{file}: task_instructions is a {type(entries).__name__}", expected="a list")
        for number, entry in enumerate(entries):
            where = f"{file}: task_instructions[{number}]"
            stage = _table(entry, where).get("stage")
            if isinstance(stage, bool) or not isinstance(stage, int) or stage < 1 or stage in stages:
                raise SourceError(f"{where}.stage is {stage!r}", expected="a count from 1, each once")
            keys = ("high_level_task", "subtask", "text")
            texts = {key: _text(entry, key, where) for key in keys}
            stages[stage] = {key: text for key, text in texts.items() if text is not None}
        tasks: dict[str, tuple[str | None, Mapping[str, str]]] = {}
        for name, task in _table(raw.get("tasks", {}), f"{file}: tasks").items():
            where = f"{file}: tasks.{name}"
            parts = _table(_table(task, where).get("subtasks", {}), f"{where}.subtasks").items()
            said = {part: _text(_table(entry, f"{where}.{part}"), "text", f"{where}.{part}") for part, entry in parts}
            known = {part: text for part, text in said.items() if text is not None}
            tasks[name] = (_text(task, "text", where), known)
        return cls(str(file), _text(raw, "high_level_task", str(file)), stages, tasks)

    def of_folders(self, task: str, subtask: str) -> Said:
        """Texts of TASK/SUBTASK: those of `tasks`, else the folders' names."""
        text, parts = self.tasks.get(task, (None, {}))
        part = parts.get(subtask) or subtask
        return Said(text or task, part, part)

    def of_stage(self, stage: int) -> Said:
        """Texts of stage<N>: its entry's, and the global high-level task where the entry has none.

        A number says nothing of the task: what is still missing raises `SourceError`.
        """
        where = f"{self.file}: stage {stage}" if self.file else f"stage{stage} has no instruction_json that says"
        fix = f'{{"task_instructions": [{{"stage": {stage}, "high_level_task": "…", "subtask": "…"}}]}}'
        if stage not in self.stages:
            found = f"{where} is not in task_instructions" if self.file else f"{where} its task"
            raise SourceError(found, expected="--set source_options.instruction_json=FILE", fix=f"a FILE with {fix}")
        entry = self.stages[stage]
        high = entry.get("high_level_task") or self.high_level_task
        for name, text in {"high_level_task": high, "subtask": entry.get("subtask")}.items():
            if not text:
                raise SourceError(f"{where} has no {name}", expected="its text", fix=fix)
        subtask = entry["subtask"]
        return Said(str(high), subtask, entry.get("text", subtask))


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SourceError(f"{where} is a {type(value).__name__}", expected="an object")
    return value


def _text(table: Mapping[str, Any], key: str, where: str) -> str | None:
    """Return a text, or None where it is absent or null. An empty one is refused: it was meant to say something."""
    value = table.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise SourceError(f"{where}.{key} is {str(value)[:80]!r}", expected="a text")
    return value.strip()
