"""LoRA and QLoRA fine-tuning of language and vision-language models in JAX."""

import os as _os

# The first allocation would otherwise take three quarters of the device, used or not.
_os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# transformers advises to install torch, which nothing here needs.
_os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from jaxlora.api.collator import UnslothVisionDataCollator, VisionDataCollator
from jaxlora.api.config import SFTConfig, TrainingArguments, UnslothTrainingArguments
from jaxlora.api.fast import FastLanguageModel, FastModel, FastVisionModel
from jaxlora.api.model import Model
from jaxlora.api.responses import train_on_responses_only
from jaxlora.api.trainer import SFTTrainer, UnslothTrainer

__all__ = [
    "FastLanguageModel",
    "FastModel",
    "FastVisionModel",
    "Model",
    "SFTConfig",
    "SFTTrainer",
    "TrainingArguments",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "UnslothVisionDataCollator",
    "VisionDataCollator",
    "train_on_responses_only",
]
