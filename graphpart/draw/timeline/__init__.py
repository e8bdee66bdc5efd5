"""Steps as charts, tables and Perfetto traces."""
