"""The JSON of the check, and the same as a page of text. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.gpu_check.advice import advice, goals
from benchmarks.gpu_check.runner import DONE, PartResult

SCHEMA = 1
SHOWN_ROWS = {"kernels": 6, "synchronising": 10}  # in the text; the JSON has all
HIDDEN = ("environment",)  # tables that the heading states
CUT = 60  # characters of a text in a table


def as_json(results: Sequence[PartResult], *, device: str, commit: str, passed: bool, complete: bool) -> dict[str, Any]:
    """Return everything that was found. `complete`: no part is still to come."""
    tables = tables_of(results)
    machine = tables.get("environment", [{}])[0]
    return {
        "schema": SCHEMA,
        "device": device,
        "commit": commit,
        "environment": machine,
        "complete": complete,
        "passed": passed,
        "parts": [asdict(result) for result in results],
        "advice": [asdict(each) for each in advice(tables)] if device == "cuda" else [],  # a small model on a CPU says nothing
        "goals": [asdict(each) for each in goals(tables)] if device == "cuda" else [],
    }


def tables_of(results: Sequence[PartResult]) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of all parts by name."""
    return {name: rows for result in results for name, rows in result.rows.items()}


def as_text(found: Mapping[str, Any]) -> str:
    """Return the page: verdict, failures, parts, tables, goals, advice, notes."""
    lines = [*_heading(found), "", *_failures(found), "Parts"]
    for part in found["parts"]:
        held = sum(proof["holds"] for proof in part["proofs"])
        proofs = f"{held}/{len(part['proofs'])} proofs" if part["proofs"] else ""
        lines.append(
            f"  {part['name']:<13} {part['status']:<10} {part['seconds']:5.0f} of {part['limit']:4.0f} s  {proofs:<13} {part['title']}"
        )
    for part in found["parts"]:
        for name, rows in part["rows"].items():
            if name not in HIDDEN:
                lines += ["", name.replace("_", " "), *table(rows[: SHOWN_ROWS.get(name, len(rows))])]
    if found["goals"]:
        lines += ["", "Goals"]
        lines += [f"  {'reached' if goal['reached'] else 'missed':<8} {goal['name']}: {goal['text']}" for goal in found["goals"]]
    if found["advice"]:
        lines += ["", "Recommended by these figures"]
        lines += [f"  {each['setting']}: {each['recommended']} ({each['reason']})" for each in found["advice"]]
    notes = [f"  {part['name']}: {note}" for part in found["parts"] for note in part["notes"]]
    if notes:
        lines += ["", "Notes", *notes]
    return "\n".join(lines) + "\n"


def _heading(found: Mapping[str, Any]) -> list[str]:
    proofs = [proof for part in found["parts"] for proof in part["proofs"]]
    held = sum(proof["holds"] for proof in proofs)
    verdict = ("PASSED" if found["passed"] else "FAILED") if found["complete"] else "NOT COMPLETE"
    machine = found["environment"]
    if found["device"] == "cuda":
        card = f"{machine.get('gpu', 'no GPU')}, {machine.get('gpu_memory_gib', 0):.0f} GiB, {machine.get('gpus', 0)} GPU(s)"
        software = f"CUDA {machine.get('cuda')}, NCCL {machine.get('nccl')}, "
    else:
        card, software = "CPU halves only: nothing here is about a GPU", ""
    software += ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "python") if name in machine)
    return [f"{verdict}: {held} of {len(proofs)} proofs hold", card, f"{software}, commit {found['commit'] or 'unknown'}"]


def _failures(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for part in found["parts"]:
        lines += [f"  {part['name']}, {proof['name']}: {proof['text']}" for proof in part["proofs"] if not proof["holds"]]
        if part["status"] != DONE:
            lines.append(f"  {part['name']}: {part['status']}: {part['error'].strip().replace(chr(10), ' / ')}")
    return ["Failed", *lines, ""] if lines else []


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return rows as aligned lines, with a header."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[column.replace("_", " ") for column in columns], *([shown(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[number]) for line in cells) for number in range(len(columns))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def shown(value: Any) -> str:
    """Return a value of a table as text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)[:CUT]
