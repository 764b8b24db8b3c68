"""The comparison: a small BERT fills in hidden notes with absolute positions, with relative attention, or with both."""
