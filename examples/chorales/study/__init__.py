"""The study: a grid of comparisons that takes the published one apart, and a report on it."""
