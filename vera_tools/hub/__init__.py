"""Both ways of the Hub, verified: `push` and `pull`, `transfer` of files, large `blobs`, the model `card`."""
