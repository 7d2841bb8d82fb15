"""What people read on a terminal: 80 columns, ASCII (on Windows AI-Toolkit's log is not UTF-8)."""
