"""Train EAGLE-3 draft models offline: dump a target's hidden states once, train drafts purely from the dump."""

__version__ = "0.1.0"
