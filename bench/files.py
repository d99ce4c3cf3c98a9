"""The JSON files that commands keep their figures in."""

import json
from pathlib import Path


class UnusableFile(ValueError):
    """A file that was given is not one that this command wrote or can write to; the message says which and why."""


def read(path: Path, schema: int) -> dict:
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        size = path.stat().st_size
        raise UnusableFile(f"{path} must hold JSON that this command wrote, got {size} bytes: {error}") from error
    found = content.get("schema") if isinstance(content, dict) else None
    if found != schema:
        raise UnusableFile(f"{path} must have schema {schema}, got {found!r}")
    return content


def write(path: Path, schema: int, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": schema} | content, indent=1) + "\n")
