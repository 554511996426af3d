"""The model of configs/bfcl_smollm2_sgcd.yaml: SmolLM2, fine-tuned on gold conversations of BFCL."""
