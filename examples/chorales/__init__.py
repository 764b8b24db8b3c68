"""Masked language modelling of Bach chorales: absolute against relative attention.

``python -m examples.chorales.compare`` runs the comparison, ``python -m examples.chorales.data`` describes the data.
Nothing is imported here, so that the commands can choose thread settings before torch is loaded.
"""
