"""The chorales: read from files or from music21's corpus, then as tokens and windows of them."""
