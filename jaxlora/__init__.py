"""LoRA and QLoRA fine-tuning of language and vision-language models in JAX."""
