"""Linear algebra on low-rank changes. Tensors in, tensors out: no files, no configs, no Z-Image."""
