"""Static pictures of numbers; the only importer of matplotlib."""
