"""The job section: schema, parsing, presets, the config file around it."""
