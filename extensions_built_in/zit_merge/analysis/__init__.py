"""What LoRA files hold, measured; no files are written here."""
