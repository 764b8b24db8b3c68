"""What `python -m relattn --check` and `--matrix` do: small calls of every backend, compared with the float64 reference.

`calls` has the features and the comparison, `matrix` every feature in every dtype as Markdown, `check` random mixtures of features and this
machine's speeds. For a user's machine, so it needs torch alone; the tests proper are more thorough and lie outside the package.
"""
