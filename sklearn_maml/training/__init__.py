"""Meta-training: the one outer loop, what it draws from, and what it keeps."""
