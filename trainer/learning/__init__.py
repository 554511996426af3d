"""The model and its update: loading, packing, scoring under the teacher, the optimiser step, SFT."""
