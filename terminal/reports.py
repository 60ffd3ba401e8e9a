"""What the commands show of their results: tables on stdout, one line of summary on stderr. They take plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla.terminal.output import emit, figures, open_log, open_out, show_facts, show_rows
from vla.terminal.safe_text import safe_line
from vla.terminal.tables import draw_table

if TYPE_CHECKING:  # rich is imported when something is shown
    from rich.text import Text


def show_left_out(left_out: Mapping[str, str]) -> None:
    """Log the episodes that were left out."""
    for episode, reason in left_out.items():
        open_log().print(safe_line(f"left out {episode}: {reason}"), highlight=False)


def committed_so_far(root: str | Path, units: int) -> str:
    """Return what an interrupted run leaves at `root`, of `units` in all, and what to type."""
    from vla.stores.commits import committed_units

    if isinstance(root, str):  # on an object store, which is not asked once more
        return f"the units committed in {root} are kept; the same command with --resume goes on"
    done = len(committed_units(root)) if root.exists() else 0
    return f"{done} of {units} units are committed in {root}; the same command with --resume goes on"


def show_featurized(
    root: str | Path, report: Mapping[str, Any], left_out: Mapping[str, str], total: int, as_json: bool
) -> None:
    """Print what `vla featurize` did. `total` counts the episodes of the source."""
    if as_json:
        emit({**report, "skipped": dict(left_out), "out": str(root)})
        return
    if report["units"]:
        busy = ", ".join(f"{stage} {share:.0%}" for stage, share in report["busy"].items())
        made = f"{report['frames']} frames in {report['units']} units, {report['frames_per_s']:.1f} frames/s ("
        made += f"{busy}; bottleneck: {report['bottleneck']})"
        open_log().print(f"{root}: {made}")
    else:
        open_log().print(f"{root}: nothing was missing")
    show_rounding(report.get("rounding", {}))
    show_left_out(left_out)
    if left_out:  # last, so that a long list above does not push it out of sight
        open_log().print(f"{root}: {len(left_out)} OF {total} EPISODES LEFT OUT", style="bold red")


def show_rounding(rounding: Mapping[str, Mapping[str, float]]) -> None:
    """Log what int8 cost each feature."""
    for name, cost in rounding.items():
        said = f"{name}: relative error {cost['error']:.2%}, {cost['saturated']:.2%} of its numbers saturated"
        if cost.get("erased"):
            said += f"; int8 rounds most rows of {cost['erased']:.2%} of its channels to 0: --dtype float16 keeps them"
        open_log().print(said)


def show_made(
    out: Path | str, made: Mapping[str, Any], said: str, as_json: bool, left_out: Mapping[str, str] | None = None
) -> None:
    """Print what a command made at `out`: `said` in words, and what it left out; or `made` as JSON."""
    if as_json:
        emit(made)
        return
    open_log().print(f"{out}: {said}")
    show_left_out(left_out or {})


def show_trained(run: Path, step: int, metrics: Mapping[str, float], facts: Mapping[str, Any], as_json: bool) -> None:
    """Print how a training run ended. `facts` stand in the JSON alone."""
    show_made(run, {"run": str(run), "step": step, **metrics, **facts}, f"step {step}, {figures(metrics)}", as_json)


def show_groups(out: Path, groups: Mapping[str, tuple[Path, int, Mapping[str, float]]], as_json: bool) -> None:
    """Print what became of each group of a training: its run, its last step, its figures."""
    if as_json:
        rows = {name: {"run": str(run), "step": step, **metrics} for name, (run, step, metrics) in groups.items()}
        emit({"run": str(out), "groups": rows})
        return
    for run, step, metrics in groups.values():
        open_log().print(f"{run}: step {step}, {figures(metrics)}")


def show_findings(findings: Iterable[str]) -> None:
    """Log findings, one a line, as they are."""
    for finding in findings:
        open_log().print(safe_line(finding), highlight=False)


def show_repair(store: str, found: Iterable[str], removed: Iterable[object], dropped: str, missing: str) -> None:
    """Log what a repair found and did; `dropped` and `missing` are units."""
    show_findings([*found, *(f"removed {path}" for path in removed)])
    lacking = f"; units {missing} are missing: the same `vla featurize` with --resume" if missing else ""
    what = f"dropped units {dropped}" if dropped else "nothing was damaged"
    open_log().print(f"{store}: {what}; free of damage{lacking}")


def show_errors(facts: Mapping[str, Any], extra: Mapping[str, float]) -> None:
    """Print what `vla evaluate` found: a row a dimension of the action, none of a head that makes no actions; a row a
    task, where there are several; and what the head itself measures, `extra`."""
    by_name = facts["per_dimension"]
    what = "figures"
    if by_name:
        titles = {"executed_mae": "error, executed steps", "mae": "error, whole horizon"}
        titles |= {"baseline_mae": "always the mean action"} if "baseline_mae" in by_name else {}
        rows = [(name, *(f"{by_name[column][name]:.4f}" for column in titles)) for name in by_name["mae"]]
        draw_table(open_out(), ("dimension", *titles.values()), rows)
        what = "mean absolute error"
    if "per_task" in facts:
        tasks = [(task, f"{error:.4f}") for task, error in facts["per_task"].items()]
        draw_table(open_out(), ("task", "error, executed steps"), tasks)
    if extra:
        print_line(figures(extra))
    print_line(f"{what} over {facts['windows']} windows; {facts['checkpoint']}, step {facts['step']}")


def show_check(facts: Mapping[str, Any], findings: Sequence[str], source: str) -> None:
    """Print what `vla inspect --source` found: facts, statistics, findings."""
    show_facts({name: fact for name, fact in facts.items() if name not in ("statistics", "by_episode")})
    for name in ("action", "state"):
        show_rows(name, facts.get("statistics", {}).get(name, []))
    show_findings(findings)
    open_log().print(f"{source}: {len(findings) or 'no'} findings")


def print_line(text: str) -> None:
    """Print one line on stdout."""
    open_out().print(text, highlight=False, soft_wrap=True)


def _entry(name: str, summary: str) -> Text:
    from rich.text import Text

    return Text.assemble(f"{name}\n", (summary, "dim"))


def show_backbones(entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table of `vla backbones`."""
    rows = [
        (
            _entry(name, entry["summary"]),
            entry["features"],
            entry["parameters"],
            f"{entry['code_licence']}; {entry['weights_licence']}",
            "\n".join(entry["missing"]) or "nothing",
        )
        for name, entry in entries.items()
    ]
    columns = ("backbone", "features a view", "parameters", "licences (code; weights)", "missing here")
    draw_table(open_out(), columns, rows, whole=[4], ruled=True)


def show_heads(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of `vla heads`."""
    cells = [
        (
            _entry(row["head"], row["summary"]),
            "\n".join(row["needs"]).replace("`", ""),
            "\n".join(row["commands"]) or "any of `vla backbones`",
        )
        for row in rows
    ]
    draw_table(open_out(), ("head", "features it needs", "made by"), cells, whole=[2], ruled=True)
    print_line("vla heads HEAD lists a head's settings.")


def show_fields(fields: Iterable[Mapping[str, str]], how: str) -> None:
    """Print every setting of a head or of a backbone, and `how` they are given."""
    rows = [(f"{field['name']}\n  = {field['default']}", f"{field['text']}\n{field['type']}") for field in fields]
    draw_table(open_out(), ("setting", "meaning, and type"), rows, whole=[0])
    print_line(how)


def show_parameters(counts: Mapping[str, tuple[int, int]]) -> None:
    """Log how many parameters each part has and how many of them train: {part: (all, training)}."""
    parts = [f"{name} {_short(total)}{_share(total, trains)}" for name, (total, trains) in counts.items()]
    total, trains = (sum(numbers) for numbers in zip(*counts.values(), strict=True)) if counts else (0, 0)
    open_log().print(f"parameters: {', '.join(parts)}; {_short(trains)} of {_short(total)} train", highlight=False)


def counting(counts: dict[str, tuple[int, int]]) -> Callable[[Any], None]:
    """Return what prints a head's parameters and notes before its first step, and keeps the counts in `counts`."""

    def begun(head: Any) -> None:
        counts.update(head.parameter_counts())
        show_parameters(counts)
        show_findings(head.notes)

    return begun


def _share(total: int, trains: int) -> str:
    return "" if trains == total else " (frozen)" if not trains else f" ({_short(trains)} of them train)"


def _short(count: int) -> str:
    """Write a count with a unit, such as 8.1 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def show_dims(groups: Mapping[tuple[int, int], Sequence[Any]]) -> None:
    """Print the table of `vla action-dims`: tasks grouped by (size of action, size of state)."""
    rows: list[tuple[str, ...]] = []
    sections = []
    for (action, state), members in groups.items():
        rows += [(d.task, str(d.episodes), str(action), str(state), ", ".join(d.names)) for d in members]
        sections.append(len(rows) - 1)
    columns = ("task", "episodes", "action", "state", "components of the action")
    draw_table(open_out(), columns, rows, sections=sections)
