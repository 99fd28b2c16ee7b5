"""Tells the browsers what has changed, through Jupyter's own event stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jupyter_events import EventLogger

_BASE = "https://jupyter.org/jupyter_hybrid"
SCHEMAS = {name: f"{_BASE}/{name}/v1" for name in ("jobs", "pools")}
"""Ids of the event schemas."""


def register(logger: EventLogger) -> None:
    """Make the schemas known to the server's event stream."""
    for name, schema_id in SCHEMAS.items():
        if schema_id not in logger.schemas.schema_ids:
            logger.register_event_schema(Path(__file__).parent / "event_schemas" / f"{name}.yaml")


def emit(logger: EventLogger, name: str, message: dict[str, Any]) -> None:
    """Send a message to all who listen; on the server's loop."""
    logger.emit(schema_id=SCHEMAS[name], data=message)
