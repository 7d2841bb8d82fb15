"""The only place that knows AI-Toolkit."""
