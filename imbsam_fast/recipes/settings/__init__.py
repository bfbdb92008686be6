"""What can be set for a run: presets, configurations, configuration files, arguments."""
