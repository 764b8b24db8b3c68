"""The models of transformers that `convert` knows: a new family is a file here and a line in `FAMILIES`.

Such a file holds a family's plan and its forward: a function that computes a layer's forward pass with
`relattn.relative_attention`, a plan that names what it replaces and what must be there before, and `PLANS`, which gives
the plan of each class.
"""

# A model's folder in transformers.models -> the module here that has its `PLANS`.
FAMILIES = {
    "deberta": "deberta",
    "deberta_v2": "deberta",
    "fastspeech2_conformer": "fastspeech2_conformer",
    "funnel": "funnel",
    "granite_speech": "granite_speech",
    "granite_speech5": "granite_speech",
    "granite_speech_plus": "granite_speech",
    "inkling": "inkling",
    "longt5": "t5",
    "mpnet": "mpnet",
    "mt5": "t5",
    "nemotron_asr_streaming": "nemotron_asr_streaming",
    "parakeet": "parakeet",
    "pix2struct": "t5",
    "pop2piano": "t5",
    "seamless_m4t": "conformer",
    "seamless_m4t_v2": "conformer",
    "sew_d": "deberta",
    "speecht5": "speecht5",
    "switch_transformers": "t5",
    "t5": "t5",
    "udop": "t5",
    "umt5": "t5",
    "vits": "vits",
    "wav2vec2_bert": "conformer",
    "wav2vec2_conformer": "conformer",
    "wavlm": "wavlm",
    "xlnet": "xlnet",
}
