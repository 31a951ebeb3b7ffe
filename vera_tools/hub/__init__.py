"""The Hub: the `client` and what its failures mean, `source` (reading by ranges), `push`, `pull`, the model `card`."""
