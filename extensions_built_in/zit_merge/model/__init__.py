"""Z-Image as data: its anatomy, and the strength keys over it."""
