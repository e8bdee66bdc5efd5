"""The partitioned model: a module that is called, differentiated and trained as the original was."""
