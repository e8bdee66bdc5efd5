"""One device's part of a program: generated code, the tape, messages, sums."""
