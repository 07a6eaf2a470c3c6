"""Fine-tuning from a safetensors file: a frozen backbone, a new head."""
