"""What PEFT's and transformers' files mean: configs, adapters, bases, manifests, and which projections they have."""
