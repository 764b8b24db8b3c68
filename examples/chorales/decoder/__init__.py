"""The decoder: a Music Transformer, what its tokens mean, what it is trained on, and its music as files."""
