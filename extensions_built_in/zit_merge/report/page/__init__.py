"""The merge page: one self-contained file that shows what a merge did and lets people compose the next one."""
