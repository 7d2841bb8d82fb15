"""Files to canonical modules and back. What trainers and clients call things stays in here."""
