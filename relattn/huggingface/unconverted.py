"""The classes of transformers whose scores depend on relative positions and that `convert` leaves as they are, and why."""

_IN_TWO_DIMENSIONS = "its relative positions are two-dimensional, between patches or boxes, which is no function of the distance of tokens"
_SOFT_CAP = "its scores, with the relative term, pass through a soft cap (tanh) before the softmax, which relattn's kernels do not have"
_ALIBI = "ALiBi's bias is one number for a key, made without a matrix; attn_implementation='sdpa' or 'eager' is as lean"
_SINKS = "its bias could be columns of query and table, as Inkling's is, but its softmax has a sink, for which relattn has no plan"

# A model's folder in transformers.models -> class -> reason.
REASONS: dict[str, dict[str, str]] = {
    "beit": {"BeitAttention": _IN_TWO_DIMENSIONS},
    "bloom": {"BloomAttention": _ALIBI},
    "clap": {"ClapAudioSelfAttention": _IN_TWO_DIMENSIONS},
    "cpmant": {"CpmAntAttention": "its bias is by distance and by which segments of the prompt two tokens are in"},
    "data2vec": {"Data2VecVisionSelfAttention": _IN_TWO_DIMENSIONS},
    "deepseek_ocr2": {"DeepseekOcr2SamVisionAttention": _IN_TWO_DIMENSIONS},
    "donut": {"DonutSwinSelfAttention": _IN_TWO_DIMENSIONS},
    "gemma3n": {"Gemma3nAudioAttention": _SOFT_CAP},
    "gemma4": {"Gemma4AudioAttention": _SOFT_CAP},
    "got_ocr2": {"GotOcr2VisionAttention": _IN_TWO_DIMENSIONS},
    "inkling2": {"Inkling2SlidingAttention": _SINKS, "Inkling2FullAttention": _SINKS},
    "layoutlmv2": {"LayoutLMv2SelfAttention": _IN_TWO_DIMENSIONS},
    "layoutlmv3": {"LayoutLMv3SelfAttention": _IN_TWO_DIMENSIONS},
    "levit": {"LevitAttention": _IN_TWO_DIMENSIONS, "LevitAttentionSubsample": _IN_TWO_DIMENSIONS},
    "longt5": {
        "LongT5LocalAttention": "its encoder attends within neighbouring blocks, in memory that is linear in the length already",
        "LongT5TransientGlobalAttention": "its encoder attends to neighbouring blocks and to summaries of blocks, whose bias is not by the "
        "distance of tokens, in memory of the length times the number of blocks",
    },
    "maskformer": {"MaskFormerSwinSelfAttention": _IN_TWO_DIMENSIONS},
    "mpt": {"MptAttention": _ALIBI},
    "phi4_multimodal": {
        "Phi4MultimodalAudioAttention": "its encoder sees at most 500 frames at a time, and adds its mask to the bias by distance as ones, "
        "which hides nothing"
    },
    "pp_doclayout_v2": {"PPDocLayoutV2ReadingOrderSelfAttention": _IN_TWO_DIMENSIONS},
    "pp_formulanet": {"PPFormulaNetVisionAttention": _IN_TWO_DIMENSIONS},
    "prophetnet": {"ProphetNetNgramSelfAttention": "it predicts several tokens at once, in streams that see each other's positions"},
    "sam": {"SamVisionAttention": _IN_TWO_DIMENSIONS},
    "sam_hq": {"SamHQVisionAttention": _IN_TWO_DIMENSIONS},
    "seggpt": {"SegGptAttention": _IN_TWO_DIMENSIONS},
    "slanext": {"SLANeXtVisionAttention": _IN_TWO_DIMENSIONS},
    "swin": {"SwinAttention": _IN_TWO_DIMENSIONS},
    "swin2sr": {"Swin2SRSelfAttention": _IN_TWO_DIMENSIONS},
    "swinv2": {"Swinv2SelfAttention": _IN_TWO_DIMENSIONS},
    "unlimited_ocr": {"UnlimitedOcrSamVisionAttention": _IN_TWO_DIMENSIONS},
    "vitdet": {"VitDetAttention": _IN_TWO_DIMENSIONS},
}


def reason_of(known: type) -> str | None:
    """Of this class or the nearest above it."""
    for base in known.__mro__:
        folder = base.__module__.removeprefix("transformers.models.").split(".")[0]
        if base.__module__.startswith("transformers.models.") and base.__name__ in REASONS.get(folder, {}):
            return REASONS[folder][base.__name__]
    return None
