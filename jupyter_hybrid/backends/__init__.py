"""Registry of the kinds of schedulers, by entry point."""
