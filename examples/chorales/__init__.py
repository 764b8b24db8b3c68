"""Masked language modelling of Bach chorales: absolute against relative attention.

``python -m examples.chorales.compare`` runs the comparison, ``python -m examples.chorales.data`` describes the data.
Nothing of weight is imported here, so that the commands can choose thread settings before torch is loaded.
"""

from importlib.util import find_spec

if find_spec("numpy") is None:
    raise ModuleNotFoundError('the chorale examples need numpy: pip install "relattn[chorales]"')
