"""LoRA: low-rank adapters on the linear layers of a frozen model, in every layout, and in PEFT's format."""
