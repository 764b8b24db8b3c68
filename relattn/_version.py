"""The version, stated once: the build reads it from here without importing the package. And what it was tried with."""

__version__ = "0.1.0"

# The oldest and the newest release supported (docs/versions.md). pip refuses older ones, `python -m relattn` names newer ones.
TRIED = {"torch": ("2.11", "2.14"), "transformers": ("5.17", "5.23")}
