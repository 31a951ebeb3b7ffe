"""What transformers knows of its classes of models: names, kinds, ties, renamings; and a model's files seen so."""
