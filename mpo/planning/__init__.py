"""What `mpo check` knows of a run before it starts: model, memory, tokens, time, and what is wrong."""
