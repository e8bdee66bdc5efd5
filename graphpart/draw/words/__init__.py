"""Plans in words: tables and the notation of cuts."""
