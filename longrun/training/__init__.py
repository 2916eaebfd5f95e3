"""The trainer's side: the only folder that imports torch, transformers, datasets, accelerate, trl."""
