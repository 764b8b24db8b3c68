"""relattn in Hugging Face models: the attention implementation "relattn", and BERT-like models with relative positions.

Importing this module registers

- ``attn_implementation="relattn"``: `relattn.relative_attention` with its mask function. An attention module without
  relative tables computes what "sdpa" does (but a query that may see no key gets 0), and also gives the weights when
  `output_attentions=True` asks;
- the model types ``relattn-bert`` and ``relattn-roberta`` with the Auto classes. `add_relative_positions` turns a model
  into one of them.

A checkpoint of such a model does not load silently as the plain model, which would drop the tables. Without this module
the Auto classes do not know the model type, and ``BertForMaskedLM.from_pretrained`` meets ``"attn_implementation":
"relattn"`` in config.json, which is not registered; both raise a ValueError. With this module imported the plain class
loads, but its first forward pass raises a RuntimeError. What remains is ``BertForMaskedLM.from_pretrained(folder,
attn_implementation="eager")``, where the caller overrules the configuration: transformers then only logs the foreign
model type, the unexpected tables and the missing position embeddings.
"""

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        'relattn.huggingface needs transformers; install it with: pip install "relattn[huggingface]"'
    ) from None

from relattn.huggingface import added as _added
from relattn.huggingface.added import TERMS, add_relative_positions, from_old_state_dict, from_pretrained
from relattn.huggingface.attention import relattn_attention, relattn_mask
from relattn.huggingface.conversion import convert, revert

__all__ = [
    "TERMS",
    "add_relative_positions",
    "convert",
    "from_old_state_dict",
    "from_pretrained",
    "relattn_attention",
    "relattn_mask",
    "revert",
]

globals().update(_added.CLASSES)  # RelativeBertModel and its like, where pickles of models look for them
