"""One run as Markdown that can be pasted into an issue."""

from __future__ import annotations

from lsiq.report.runs import settings_of, value_text
from lsiq.results.record import Record
from lsiq.track.panels import markdown
from lsiq.track.run_panels import record_panels


def summary(record: Record) -> str:
    """Return what a run was, what it found and what it ran on."""
    versions = ", ".join(f"{name} {record.versions[name]}" for name in ("lsiq", "torch", "python") if record.versions)
    machine = ", ".join(f"{name} {value}" for name, value in record.machine.items())
    clean = {True: "", False: " with changes", None: ""}[record.clean]
    parts = [
        f"### {record.model} · {record.setting} · {record.method} · seed {record.seed}",
        f"`{record.run_id}`, {record.status}, {record.created}" + (f"\n\n> {record.error}" if record.error else ""),
        f"    {record.command}",
        *record.notes,
        "; ".join(part for part in (versions, machine, f"commit {(record.commit or 'unknown')[:12]}{clean}") if part),
    ]
    for table in record_panels(record):
        if not table.rows:
            continue
        title, text = table.name.partition("/")[2], markdown(table)
        parts.append(_folded(title, text) if title == "blocks" else f"**{title}**\n\n{text}")
    settings = "\n".join(f"{key}={value_text(value)}" for key, value in settings_of(record).items())
    parts.append(_folded("settings", f"```\n{settings}\n```"))
    return "\n\n".join(parts) + "\n"


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"
