"""The implementations that are measured; one file a source."""
