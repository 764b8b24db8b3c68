"""relattn: exact relative attention in O(L D) memory. See `relative_attention` and `RelativeMultiheadAttention`."""

from importlib.util import find_spec as _find_spec

if _find_spec("relattn.kernels") is None:
    raise ImportError(
        "this is relattn's source tree, without its kernels (they lie in kernels/ beside it); install it from there: pip install -e ."
    )

from relattn import export
from relattn._version import __version__
from relattn.backends import available_backends
from relattn.backends.reference import shaw_relative_scores, skew, unskew
from relattn.cache import KeyValueCache
from relattn.functional import Explanation, explain, relative_attention
from relattn.module import RelativeMultiheadAttention
from relattn.operators import RelativeAttentionFunction
from relattn.varlen import relative_attention_varlen

__all__ = [
    "Explanation",
    "KeyValueCache",
    "RelativeAttentionFunction",
    "RelativeMultiheadAttention",
    "__version__",
    "available_backends",
    "explain",
    "export",
    "relative_attention",
    "relative_attention_varlen",
    "shaw_relative_scores",
    "skew",
    "unskew",
]
