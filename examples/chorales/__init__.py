"""Bach chorales: absolute against relative attention, and a decoder that sings. README.md draws the rooms.

Nothing of weight is imported here or by the rooms' own `__init__`, so that the commands can choose thread settings
before torch is loaded.
"""

from importlib.util import find_spec

if find_spec("numpy") is None:
    raise ModuleNotFoundError('the chorale examples need numpy: pip install "relattn[chorales]"')
