"""Files and text, nothing of LoRAs: whole writes, YAML with line numbers, paths, the Hugging Face hub."""
