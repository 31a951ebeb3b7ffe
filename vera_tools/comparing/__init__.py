"""Two checkpoints side by side: `diff`, and the norms of their weight `updates`."""
