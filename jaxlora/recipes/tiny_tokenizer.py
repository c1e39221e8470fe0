"""A tokenizer of a few hundred entries, trained on the spot, in the files that a checkpoint folder has."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Family = Literal["gemma3", "llama", "llava", "mllama", "pixtral", "qwen2_vl"]

TEXT = [
    "A small boat crossed the cold river at dawn, and nobody on the bank said a word about it.",
    "What is the total on this receipt? The total is 41.70, tax included, and the date is 3 May.",
    "system user assistant tool: you are a helpful assistant who reads tables, forms and letters.",
    "Describe the picture in one sentence. It shows two red apples on a wooden table near a window.",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 4))  # 12\n",
    "Question: how many people are there? Answer: there are four people and a dog.",
]

_LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]

SPECIAL_TOKENS = {
    "gemma3": [
        *["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        *["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
    ],
    "llama": _LLAMA,
    "llava": ["<unk>", "<s>", "</s>", "<pad>", "<image>"],
    "mllama": [*_LLAMA, "<|image|>"],
    "pixtral": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"],
    "qwen2_vl": [
        *["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"],
        *["<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"],
    ],
}

ROLES = {
    "gemma3": {"bos_token": "<bos>", "eos_token": "<end_of_turn>", "pad_token": "<pad>"},
    **dict.fromkeys(("llama", "mllama"), {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad|>"}),
    **dict.fromkeys(("llava", "pixtral"), {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}),
    "qwen2_vl": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
}

CHAT_TEMPLATES = {
    "gemma3": (
        "{{ bos_token }}{% for message in messages %}<start_of_turn>"
        "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "llama": (
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "llava": (
        "{% for message in messages %}{{ message['role'] | upper }}: {% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "pixtral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]{% endif %}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '[/INST]' if message['role'] == 'user' else eos_token }}{% endfor %}"
    ),
    "mllama": (
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "qwen2_vl": (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
        "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}

# Names that transformers gives to tokens of its own processors.
_NAMED = {"gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}}

PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    **{"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255, "resample": 3},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    **{"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2},
    "size": {"shortest_edge": 3136, "longest_edge": 1003520},
}

_COMMON = ("do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "rescale_factor", "resample")
PREPROCESSORS = {
    "gemma3": {
        "image_processor_type": "Gemma3ImageProcessor",
        **{"do_convert_rgb": None, "do_normalize": True, "do_pan_and_scan": None, "do_rescale": True, "do_resize": True},
        **{"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "rescale_factor": 1 / 255},
        "size": {"height": 896, "width": 896},
    },
    "llava": {
        **{name: PREPROCESSOR[name] for name in (*_COMMON, "image_mean", "image_std")},
        **{"image_processor_type": "CLIPImageProcessor", "do_center_crop": True},
        **{"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}},
    },
    "pixtral": {
        **{name: PREPROCESSOR[name] for name in (*_COMMON, "image_mean", "image_std")},
        **{"image_processor_type": "PixtralImageProcessor", "patch_size": {"height": 16, "width": 16}, "size": {"longest_edge": 1024}},
    },
    "mllama": {
        "image_processor_type": "MllamaImageProcessor",
        **{"do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True},
        **{"max_image_tiles": 4, "resample": 2, "rescale_factor": 1 / 255, "size": {"height": 560, "width": 560}},
        **{name: PREPROCESSOR[name] for name in ("image_mean", "image_std")},
    },
    "qwen2_vl": PREPROCESSOR,
}


def make_tokenizer(folder: str | Path, family: Family = "llama", texts: Sequence[str] = TEXT) -> Path:
    """Writes tokenizer files and chat_template.jinja, and for models that see preprocessor_config.json; returns the folder.

    ``texts`` are what its merges are learnt from. Special tokens have the ids 0, 1, … in the order of ``SPECIAL_TOKENS``.

    >>> # make_tokenizer("model", "qwen2_vl")
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = SPECIAL_TOKENS[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 256 + 120,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "padding_side": "right", **ROLES[family]}
    config["additional_special_tokens"] = [token for token in special if token not in ROLES[family].values()]
    config["extra_special_tokens"] = _NAMED.get(family, {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATES[family])
    if family in PREPROCESSORS:
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSORS[family], indent=2))
    return folder
