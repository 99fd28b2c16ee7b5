"""The extension of Jupyter Server: named ``hybrid``, enabled by the package itself."""

from __future__ import annotations

import contextlib
from typing import Any

from jupyter_server.extension.application import ExtensionApp

from . import events
from .handlers import ROUTES
from .service import Service


class HybridApp(ExtensionApp):
    """Follows all jobs while the server lives, and answers for the side panel."""

    name = "hybrid"
    app_name = "jupyter_hybrid"
    description = "Jobs on every pool: REST under /hybrid/api/v1, changes through the event stream"
    load_other_extensions = True

    def initialize_settings(self) -> None:
        """Make the service, and have it begin with the server's loop."""
        server: Any = self.serverapp
        events.register(server.event_logger)
        loop = server.io_loop.asyncio_loop

        def tell(name: str, message: dict[str, Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(events.emit, server.event_logger, name, message)

        self.service = Service(server.root_dir, tell)
        self.settings["hybrid_service"] = self.service
        server.io_loop.add_callback(self.service.start)

    def initialize_handlers(self) -> None:
        """Add the handlers."""
        self.handlers.extend(ROUTES)

    async def stop_extension(self) -> None:
        """Give back the leases, so that a kernel takes over at once."""
        await self.service.stop()
