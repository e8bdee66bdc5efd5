"""Who runs the devices of a program: threads of one process, or a process each."""
