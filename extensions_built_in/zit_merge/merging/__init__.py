"""From plans to files, module by module, each checked while it is written."""
