"""From a section to plans: what is read, how strong, which rank, what is written, how large."""
